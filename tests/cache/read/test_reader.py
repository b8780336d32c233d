"""Writer and reader: what goes in comes out, by key, in any order."""

import multiprocessing
import pickle
import zlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import kdfast.cache
from kdfast.cache import codecs
from kdfast.cache.codecs import Codec
from kdfast.cache.read.walk import BATCH_VALUES, walk
from kdfast.labels import SoftLabels
from support.caches import VOCAB, logits, writer


def fill(path, keys, **options):
    """One record of ``i % 5 + 1`` rows per key."""
    with writer(path, **options) as w:
        for i, key in enumerate(keys):
            w.add(key, logits(i % 5 + 1, seed=i))
    return kdfast.cache.open(path)


def expect(i, codec="topk", **options):
    """What ``fill`` stored under its i-th key, without a file in between."""
    made = codecs.create(codec, VOCAB, (1.0,), {"k": 4, **options} if codec == "topk" else options)
    rows = logits(i % 5 + 1, seed=i)
    block = np.frombuffer(made.encode(made.select(rows, b"")), np.uint8)
    return made.decode(block, np.array([[0, block.size, len(rows)]]), np.arange(len(rows)))


def assert_same(got, want):
    assert repr(got) == repr(want)  # kind, rows, vocabulary, temperatures
    for field in ("values", "ids", "offsets", "tails"):
        ours, theirs = getattr(got, field), getattr(want, field)
        assert ours is theirs is None or torch.equal(ours, theirs), field


KEYS = [torch.tensor([1, 2, 3]), "name", b"name", 7, torch.tensor([7]), "7", torch.tensor([], dtype=torch.int32)]


@pytest.mark.parametrize("block_rows", [1, 4, 1024])
@pytest.mark.parametrize("shard_bytes", [1, 200, 2**20])
def test_records_come_back_by_key(tmp_path, block_rows, shard_bytes):
    cache = fill(tmp_path, KEYS, block_rows=block_rows, shard_bytes=shard_bytes)
    for i, key in enumerate(KEYS):
        assert key in cache
        assert_same(cache[key], expect(i))
    assert len(cache) == cache.info.records == len(KEYS)
    assert cache.nbytes == cache.info.payload_bytes == cache.info.rows * (4 * 2 + 4 * 2 + 4)
    cache.verify()


def test_dense_records_come_back_by_key(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="dense") as w:
        for i in range(20):
            w.add(i, logits(i % 5 + 1, seed=i))
    cache = kdfast.cache.open(tmp_path)
    for i in reversed(range(20)):
        torch.testing.assert_close(cache[i].values, expect(i, "dense").values)
    assert cache.nbytes == cache.info.rows * (VOCAB + 4)


def test_gather_keeps_the_order_of_its_keys(tmp_path):
    cache = fill(tmp_path, range(12), shard_bytes=300, block_rows=6)
    assert cache.info.shards > 2
    order = [11, 0, 5, 5, 3]
    assert_same(cache.gather(order), SoftLabels.cat([expect(i) for i in order]))
    assert len(cache.gather([])) == 0
    assert len(cache.gather(iter([1, 2]))) == 2 + 3


def test_a_single_row_and_an_empty_record(tmp_path):
    with writer(tmp_path) as w:
        w.add("nothing", logits(0))
        w.add("one", logits(1)[0])
    cache = kdfast.cache.open(tmp_path)
    assert (len(cache["nothing"]), len(cache["one"]), len(cache.gather(["nothing", "one"]))) == (0, 1, 1)


def test_a_cache_of_empty_records_alone(tmp_path):
    with writer(tmp_path) as w:
        w.add("nothing", logits(0))
    cache = kdfast.cache.open(tmp_path)
    cache.verify()
    assert (len(cache), cache.nbytes, len(cache["nothing"])) == (1, 0, 0)


def test_keys_are_given_in_order_and_accepted(tmp_path):
    cache = fill(tmp_path, KEYS, shard_bytes=1)
    for i, key in enumerate(cache.keys()):
        assert_same(cache[key], expect(i))
    assert list(cache) == list(cache.keys())


def test_the_first_of_equal_keys_stays(tmp_path):
    with writer(tmp_path) as w:
        for seed in range(3):
            w.add("a", logits(2, seed))
        assert (w.records, w.rows, w.duplicates) == (1, 2, 2)
        assert ("a" in w, "b" in w) == (True, False)
    with writer(tmp_path) as w:
        w.add("a", logits(2, seed=9))
        assert w.duplicates == 1
    cache = kdfast.cache.open(tmp_path)
    assert (len(cache), cache.info.duplicates, cache.info.rows) == (1, 0, 2)
    torch.testing.assert_close(cache["a"].values[0], logits(2).log_softmax(1)[0].max(), rtol=1e-3, atol=0)


def test_writers_with_names_share_a_directory(tmp_path):
    with writer(tmp_path, writer="rank0") as first, writer(tmp_path, writer="rank1") as second:
        first.add("both", logits(1, seed=1))
        second.add("both", logits(2, seed=2))
        second.add("second", logits(3))
    cache = kdfast.cache.open(tmp_path)
    assert (len(cache), cache.info.duplicates, cache.info.rows) == (2, 1, 6)
    assert len(cache["both"]) == 1
    fill(tmp_path, ["later"], writer="rank2")
    assert [p.name for p in tmp_path.glob("shard-rank2-*")] == ["shard-rank2-00000.safetensors"]


def test_appending_continues(tmp_path):
    fill(tmp_path, range(3))
    with writer(tmp_path) as w:
        for i in range(6):
            w.add(i, logits(i % 5 + 1, seed=i))
    cache = kdfast.cache.open(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == [f"shard-0-{n:05d}.safetensors" for n in (0, 1)]
    assert_same(cache.gather(range(6)), SoftLabels.cat([expect(i) for i in range(6)]))


def test_foreign_files_are_left_alone(tmp_path):
    for name in ("shard-0-00007.safetensors.12-ab.part", "notes.txt", "model.safetensors"):
        (tmp_path / name).write_text("x")
    assert len(fill(tmp_path, ["a"])) == 1
    assert (tmp_path / "notes.txt").exists()


def test_a_reader_pickles_without_its_data(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="dense") as w:
        w.add("a", torch.zeros(100_000, VOCAB))
    cache = kdfast.cache.open(tmp_path)
    first = cache["a"]
    data = pickle.dumps(cache)
    assert len(data) < 10_000 < cache.nbytes
    assert_same(pickle.loads(data)["a"], first)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    cache = fill(tmp_path, range(6), shard_bytes=100)
    assert len(cache[0]) == 1  # mapped before the workers start
    loader = DataLoader(range(6), batch_size=3, collate_fn=cache.gather, num_workers=2, multiprocessing_context=method)
    for got, start in zip(loader, (0, 3), strict=True):
        assert_same(got, SoftLabels.cat([expect(i) for i in range(start, start + 3)]))


@codecs.register
class Zipped(Codec):
    """Blocks of any length, from a codec that writer and reader have never heard of."""

    name = "zipped"
    kind = "dense"

    def config(self):
        return {}

    def select(self, logits, key):
        return SoftLabels.dense(logits.float())

    def encode(self, labels):
        return zlib.compress(labels.values.numpy().tobytes())

    def decode(self, data, units, wanted):
        parts = [zlib.decompress(data[begin : begin + length]) for begin, length, _ in units.tolist()]
        rows = np.frombuffer(b"".join(parts), "<f4").reshape(-1, VOCAB)
        return SoftLabels.dense(torch.from_numpy(rows[wanted]))


def test_a_variable_length_codec_plugs_in(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="zipped", block_rows=8, shard_bytes=600) as w:
        for i in range(20):
            w.add(i, logits(i % 5 + 1, seed=i))
    cache = kdfast.cache.open(tmp_path)
    cache.verify()
    assert cache.info.shards > 1
    wanted = torch.cat([logits(i % 5 + 1, seed=i) for i in (19, 3)])
    assert torch.equal(cache.gather([19, 3]).values, wanted)


def test_shards_stay_near_the_size_asked_for(tmp_path):
    with writer(tmp_path, shard_bytes=2000, block_rows=4) as w:
        for i in range(300):
            w.add(i, logits(2, seed=i))
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("shard-*"))]
    assert len(sizes) > 5
    assert max(sizes) < 2000 + 2200


def test_a_walk_is_in_batches_of_bounded_size(tmp_path):
    rows, vocab = 100, BATCH_VALUES // 250
    with kdfast.cache.Writer(tmp_path, vocab_size=vocab, codec="dense", keys="range") as w:
        for i in range(6):
            w.add(i, torch.zeros(0 if i == 0 else rows, vocab))
    batches = list(walk(tmp_path, kdfast.cache.open(tmp_path)))
    assert [batch.keys for batch in batches] == [[0], [1], [2, 3], [4, 5]]
    assert all(batch.labels.values.numel() <= BATCH_VALUES for batch in batches)
    assert [len(labels) for batch in batches for _, labels in batch.records()] == [0, *[rows] * 5]
