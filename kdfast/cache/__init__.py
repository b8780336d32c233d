"""The soft-label cache: run the teacher once, keep a few bytes per token, train any number of students from it.

    with kdfast.cache.Writer(path, vocab_size=V, codec="topk", k=16, teacher="my-teacher-v1") as writer:
        writer.add(ids, logits)
    cache = kdfast.cache.open(path)
    labels = cache.gather([ids, other_ids])  # SoftLabels, as kd_loss takes them

    index = cache.index(all_ids)  # a loop over epochs hashes its keys once
    labels = cache.gather(index[batch])

``FORMAT.md`` gives the files byte by byte. ``kdfast.cache.codecs`` lists what a row can be stored as.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from kdfast._optional import lazy_attributes as _lazy_attributes
from kdfast._record_keys import record_keys
from kdfast.cache.capture.capture import capture
from kdfast.cache.capture.fingerprint import fingerprint, head_fingerprint
from kdfast.cache.capture.lm import capture_lm, windows
from kdfast.cache.capture.output_layer import output_layer
from kdfast.cache.capture.report import CaptureReport
from kdfast.cache.errors import CacheBusyError, CacheCorruptError, CacheError, CacheMismatchError
from kdfast.cache.format.keys import Key, replica_key
from kdfast.cache.format.view import View
from kdfast.cache.read.loader import CacheDataset, ElasticSampler
from kdfast.cache.read.lookup import RecordIndex
from kdfast.cache.read.packed import PackedLabels
from kdfast.cache.read.reader import CacheInfo, CacheReader
from kdfast.cache.read.reader import open_cache as open
from kdfast.cache.read.spans import mask_spans, pack_spans
from kdfast.cache.selection.learn_prototypes import learn_prototypes
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.cache.write.salvage import salvage
from kdfast.cache.write.writer import Writer

if _TYPE_CHECKING:
    from kdfast.cache.capture.ray import ray_capture
    from kdfast.cache.capture.vllm import capture_vllm

Shapes = PrototypeTable  # the names before 0.2
learn_shapes = learn_prototypes

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
    "PrototypeTable",
    "RecordIndex",
    "Shapes",
    "View",
    "Writer",
    "capture",
    "capture_lm",
    "capture_vllm",
    "fingerprint",
    "head_fingerprint",
    "learn_prototypes",
    "learn_shapes",
    "mask_spans",
    "open",
    "output_layer",
    "pack_spans",
    "ray_capture",
    "record_keys",
    "replica_key",
    "salvage",
    "windows",
]

__getattr__ = _lazy_attributes(
    __name__, {"capture_vllm": "kdfast.cache.capture.vllm", "ray_capture": "kdfast.cache.capture.ray"}
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
