"""Finding records: the sorted index, its absence and its damage, keys that collide, keys that are consecutive."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import kdfast.cache
from kdfast import _C
from kdfast.cache.codecs import TopK
from kdfast.cache.format.container import pack
from kdfast.cache.format.keys import Key, make_key
from kdfast.cache.format.meta import CacheMeta
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.sorted_keys import INDEX, write_index
from kdfast.cache.format.storage import open_storage
from support.repack import repack

VOCAB = 11


def logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def writer(path, **options):
    return kdfast.cache.Writer(path, **{"vocab_size": VOCAB, "codec": "topk", "k": 3, **options})


def fill(path, names, rows=lambda i: i % 3 + 1, **options):
    """A record of ``rows(i)`` rows for the i-th key, or for key i: every writer stores the same for an integer."""
    with writer(path, **options) as w:
        for i, key in enumerate(names):
            seed = key if isinstance(key, int) else i
            w.add(key, logits(rows(seed), seed))
    return kdfast.cache.open(path)


def assert_same(got, want):
    assert repr(got) == repr(want)
    for field in ("values", "ids", "offsets", "tails"):
        ours, theirs = getattr(got, field), getattr(want, field)
        assert ours is theirs is None or torch.equal(ours, theirs), field


# ---- the index file ---------------------------------------------------------------------------------------------


def test_the_index_finds_what_sorting_in_memory_finds(tmp_path):
    mapped = fill(tmp_path, range(50), shard_bytes=300, block_rows=4)
    assert mapped.info.index == INDEX
    assert mapped.info.shards > 3
    (tmp_path / INDEX).unlink()
    sorted_here = kdfast.cache.open(tmp_path)
    assert sorted_here.info.index == "in memory: there is no index.safetensors"
    order = np.random.default_rng(0).permutation(50).tolist()
    for cache in (mapped, sorted_here, pickle.loads(pickle.dumps(mapped))):
        assert_same(cache.gather(order), kdfast.SoftLabels.cat([mapped[key] for key in order]))
        assert list(cache) == [make_key(key) for key in range(50)]
        assert 50 not in cache


def test_the_index_is_what_its_page_says(tmp_path):
    fill(tmp_path, "abc", shard_bytes=1, block_rows=1)
    tables = load_file(tmp_path / INDEX)
    prefixes = [int.from_bytes(make_key(key)[:8], "little") for key in "abc"]
    assert tables["prefixes"].tolist() == sorted(prefixes)
    assert tables["records"].tolist() == np.argsort(prefixes).tolist()
    assert tables["duplicates"].tolist() == []


def test_an_index_of_other_shards_is_not_used(tmp_path):
    fill(tmp_path, range(9))
    old = (tmp_path / INDEX).read_bytes()
    fill(tmp_path, range(9, 20), writer="1")
    (tmp_path / INDEX).write_bytes(old)
    cache = kdfast.cache.open(tmp_path)
    assert cache.info.index == "in memory: index.safetensors was made for other shards"
    assert len(cache.gather(range(20))) == sum(i % 3 + 1 for i in range(20))
    cache.verify()


def test_a_damaged_index_is_noticed_and_does_no_harm(tmp_path):
    cache = fill(tmp_path, range(4))
    want, good = cache.gather(range(4)), (tmp_path / INDEX).read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (tmp_path / INDEX).write_bytes(bad)
        cache = kdfast.cache.open(tmp_path)
        assert cache.info.index.startswith(f"in memory: {tmp_path / INDEX}: ")
        assert_same(cache.gather(range(4)), want)
        with pytest.raises(kdfast.cache.CacheCorruptError, match=INDEX):
            cache.verify()


def test_keys_with_one_prefix_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    keys = [Key(bytes([i % 2]) * 8 + rng.bytes(8)) for i in range(40)]
    twice = keys[5:15]
    with writer(tmp_path, writer="a", shard_bytes=200, block_rows=2) as w:
        for i, key in enumerate(keys):
            w.add(key, logits(1, i))
    with writer(tmp_path / "other", writer="b") as w:
        for i, key in enumerate(twice):
            w.add(key, logits(2, 100 + i))
    (tmp_path / "other" / "shard-b-00000.safetensors").rename(tmp_path / "shard-b-00000.safetensors")
    for index in ("in memory", INDEX):
        cache = kdfast.cache.open(tmp_path)
        assert cache.info.index.startswith(index)
        assert (len(cache), cache.info.duplicates) == (40, 10)
        assert list(cache) == keys
        assert [len(cache[key]) for key in keys] == [1] * 40
        tops = torch.stack([logits(1, i).log_softmax(1).max() for i in range(40)])
        torch.testing.assert_close(cache.gather(keys).values.view(-1, 3)[:, 0], tops, rtol=2e-3, atol=0)
        assert Key(bytes(8) + bytes(8)) not in cache
        assert Key(b"\1" * 8 + b"\xff" * 8) not in cache
        write_index(open_storage(tmp_path), [Shard(p) for p in sorted(tmp_path.glob("shard-*"))])


# ---- consecutive keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [lambda i: 1, lambda i: i % 3], ids=["one row each", "any rows"])
def test_consecutive_keys_are_not_stored_and_serve_as_stored_ones_do(tmp_path, rows):
    stored = fill(tmp_path / "hash", range(30), rows)
    for name, part in (("b", range(7)), ("a", range(7, 30))):
        cache = fill(tmp_path / "range", part, rows, writer=name, keys="range", shard_bytes=120, block_rows=2)
    assert (cache.info.keys, cache.info.index) == ("range", "none: keys are consecutive integers")
    assert cache.info.shards > 4
    assert not (tmp_path / "range" / INDEX).exists()
    for path in (tmp_path / "range").glob("shard-*"):
        tables = load_file(path)
        assert tables["record_keys"].shape == (0, 16)
        assert (len(tables["record_spans"]) == 0) == (rows(0) == 1)
    assert len(cache) == 30
    assert list(cache) == [*range(7, 30), *range(7)]
    order = np.random.default_rng(0).permutation(30)
    want = stored.gather(order.tolist())
    for keys in (order, torch.from_numpy(order), order.tolist(), iter(order)):
        assert_same(cache.gather(keys), want)
    assert_same(cache.gather(range(30)), stored.gather(range(30)))
    assert all(key in cache for key in (0, 29, np.int32(3)))
    assert not any(key in cache for key in (-1, 30, 2**70, "0", b"0", torch.tensor([1])))
    with pytest.raises(KeyError, match="30 is not in"):
        cache.gather([3, 30])
    with pytest.raises(TypeError, match="a key is"):
        cache.gather([1.5])


def test_one_row_each_needs_no_spans(tmp_path):
    cache = fill(tmp_path, "abcdef", lambda i: 1, block_rows=4)
    tables = load_file(tmp_path / "shard-0-00000.safetensors")
    assert (tables["record_spans"].shape, tables["record_keys"].shape) == ((0, 2), (6, 16))
    assert [len(cache[key]) for key in "fa"] == [1, 1]
    assert_same(cache.gather("fa"), kdfast.SoftLabels.cat([cache["f"], cache["a"]]))


def test_a_writer_of_consecutive_keys_resumes_where_it_was(tmp_path):
    def interrupted():
        with writer(tmp_path, keys="range") as w:
            for i in range(3, 8):
                w.add(i, logits(1, i))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    with writer(tmp_path, keys="range") as w:
        assert [i in w for i in (2, 3, 7, 8)] == [False, True, True, False]
        for i in range(3, 12):
            w.add(i, logits(1, i))
        assert w.duplicates == 5
    cache = kdfast.cache.open(tmp_path)
    assert list(cache) == list(range(3, 12))
    assert_same(cache.gather(range(3, 12)), fill(tmp_path / "b", range(3, 12), lambda i: 1).gather(range(3, 12)))


def test_a_gap_in_consecutive_keys_is_refused(tmp_path):
    with writer(tmp_path, keys="range") as w:
        w.add(5, logits(1))
        with pytest.raises(ValueError, match=r"^7: keys='range' takes consecutive integers: 6 comes next"):
            w.add(7, logits(1))
        with pytest.raises(TypeError, match="with keys='range' a key is an int, got 'a'"):
            w.add("a", logits(1))
        w.add(6, logits(1))
    assert list(kdfast.cache.open(tmp_path)) == [5, 6]


def test_the_first_of_overlapping_ranges_counts(tmp_path):
    for name, part, rows in (("b", range(4, 12), 2), ("a", range(6, 9), 1)):
        fill(tmp_path / name, part, lambda i, rows=rows: rows, writer=name, keys="range")
    (tmp_path / "b" / "shard-b-00000.safetensors").rename(tmp_path / "a" / "shard-b-00000.safetensors")
    (tmp_path / "a" / "manifest.json").unlink()
    cache = kdfast.cache.open(tmp_path / "a")
    assert (len(cache), cache.info.duplicates) == (8, 3)
    assert list(cache) == [6, 7, 8, 4, 5, 9, 10, 11]
    assert [len(cache[i]) for i in range(4, 12)] == [2, 2, 1, 1, 1, 2, 2, 2]


def test_stored_and_consecutive_keys_do_not_mix(tmp_path):
    fill(tmp_path, "a")
    with pytest.raises(kdfast.cache.CacheMismatchError, match=r"keys='range', but .* has keys='hash'"):
        writer(tmp_path, writer="1", keys="range")


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"keys": "other"}, kdfast.cache.CacheError, "has keys 'other', this kdfast reads 'hash' and 'range'"),
        ({"spans": "two"}, kdfast.cache.CacheError, "has spans 'two', which this kdfast does not read"),
        ({"keys": "hash"}, kdfast.cache.CacheCorruptError, "its tables differ in length"),
        ({"first_record": "-1"}, kdfast.cache.CacheCorruptError, "its first_record -1 is out of range"),
        ({"first_record": "x"}, kdfast.cache.CacheCorruptError, "its first_record x is out of range"),
    ],
)
def test_hostile_numbering_is_refused(tmp_path, metadata, error, message):
    fill(tmp_path, range(5), lambda i: 1, keys="range")
    repack(tmp_path / "shard-0-00000.safetensors")
    assert len(kdfast.cache.open(tmp_path)) == 5
    repack(tmp_path / "shard-0-00000.safetensors", metadata)
    with pytest.raises(error, match=f"shard-0-00000.safetensors: {message}"):
        kdfast.cache.open(tmp_path)


# ---- memory and distance ----------------------------------------------------------------------------------------


def write_large(path, records, rng):
    """A shard of so many records of one or two rows, as a writer would leave it."""
    codec = TopK(VOCAB, (1.0,), k=1)
    rows = rng.integers(1, 3, records)
    ends = rows.cumsum()
    blocks = np.unique(np.append(ends[np.searchsorted(ends, np.arange(1000, ends[-1], 1000))], ends[-1]))
    first = np.concatenate([[0], blocks[:-1]])
    payload = np.zeros(ends[-1], codec.row_dtype)
    index = np.stack([first * codec.row_bytes, (blocks - first) * codec.row_bytes, first, blocks - first], 1)
    tables = {
        "block_index": index,
        "record_spans": np.stack([ends - rows, rows], 1),
        "record_keys": rng.integers(0, 256, (records, 16)).astype(np.uint8),
        "block_crc": np.array([_C.crc32c(payload[a:b]) for a, b in zip(first, blocks, strict=True)]),
    }
    before, after = pack(CacheMeta.of(codec, "").to_strings(), payload.nbytes, tables)
    path.mkdir()
    (path / "shard-0-00000.safetensors").write_bytes(before + payload.tobytes() + after)
    write_index(open_storage(path), [Shard(path / "shard-0-00000.safetensors")])
    return [Key(row.tobytes()) for row in tables["record_keys"][:50]], rows[:50]


def test_what_a_reader_allocates_does_not_grow_with_the_cache(tmp_path):
    keys, rows = write_large(tmp_path / "large", 200_000, np.random.default_rng(0))
    tracemalloc.start()
    cache = kdfast.cache.open(tmp_path / "large")
    labels = cache.gather(keys)
    present, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(cache), cache.info.index, len(labels)) == (200_000, INDEX, rows.sum())
    assert peak < 1_000_000  # one int64 per record would be 1.6 MB
    assert present < 200_000  # one byte per record would be as much


def test_a_remote_cache_is_read_through_local_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "downloads"))
    want = fill(tmp_path / "local", range(12), shard_bytes=200, block_rows=2)
    url = f"memory://{tmp_path.name}"
    got = fill(url, range(12), shard_bytes=200, block_rows=2)
    assert (got.info.shards, got.info.index) == (want.info.shards, INDEX)
    assert url in repr(got)
    assert_same(got.gather(range(12)), want.gather(range(12)))
    assert_same(pickle.loads(pickle.dumps(got)).gather([7, 3]), want.gather([7, 3]))
    got.verify()
