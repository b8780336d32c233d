"""The soft-label cache: run the teacher once, keep a few bytes per token, train any number of students from it.

    with kdfast.cache.Writer(path, vocab_size=V, codec="topk", k=16, teacher="my-teacher-v1") as writer:
        writer.add(ids, logits)
    cache = kdfast.cache.open(path)
    labels = cache.gather([ids, other_ids])  # SoftLabels, as kd_loss takes them

    index = cache.index(all_ids)  # a loop over epochs hashes its keys once
    labels = cache.gather(index[batch])

``FORMAT.md`` gives the files byte by byte. ``kdfast.cache.codecs`` lists what a row can be stored as.
"""

from kdfast.cache.capture import CaptureReport, capture
from kdfast.cache.errors import CacheBusyError, CacheCorruptError, CacheError, CacheMismatchError
from kdfast.cache.fingerprint import fingerprint, head_fingerprint
from kdfast.cache.index import RecordIndex
from kdfast.cache.keys import Key, replica_key
from kdfast.cache.learn_shapes import learn_shapes
from kdfast.cache.lm import capture_lm, output_layer, windows
from kdfast.cache.loader import CacheDataset, ElasticSampler
from kdfast.cache.packed import PackedLabels
from kdfast.cache.ray_capture import ray_capture
from kdfast.cache.reader import CacheInfo, CacheReader
from kdfast.cache.reader import open_cache as open
from kdfast.cache.salvage import salvage
from kdfast.cache.shapes import Shapes
from kdfast.cache.spans import pack_spans
from kdfast.cache.view import View
from kdfast.cache.vllm import capture_vllm
from kdfast.cache.writer import Writer

__all__ = [
    "CacheBusyError",
    "CacheCorruptError",
    "CacheDataset",
    "CacheError",
    "CacheInfo",
    "CacheMismatchError",
    "CacheReader",
    "CaptureReport",
    "ElasticSampler",
    "Key",
    "PackedLabels",
    "RecordIndex",
    "Shapes",
    "View",
    "Writer",
    "capture",
    "capture_lm",
    "capture_vllm",
    "fingerprint",
    "head_fingerprint",
    "learn_shapes",
    "open",
    "output_layer",
    "pack_spans",
    "ray_capture",
    "replica_key",
    "salvage",
    "windows",
]
