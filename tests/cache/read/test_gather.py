"""Gathering many records at once: the same labels as one at a time, whatever shards and blocks they lie in."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast.cache
from kdfast import _C
from kdfast.cache import codecs
from kdfast.cache.codecs import TopK
from kdfast.cache.format.container import read_container
from kdfast.cache.format.keys import make_key, make_keys
from kdfast.labels import SoftLabels
from support.repack import repack

VOCAB = 11
CODECS = [("topk", {"k": 4}), ("dense", {}), ("by block", {"k": 4})]


@codecs.register
class ByBlock(codecs.Codec):
    """Delegates to ``topk`` without being a ``FixedWidthCodec``: read block by block."""

    name = "by block"
    kind = "topk"

    def __init__(self, vocab_size, temperatures, **options):
        super().__init__(vocab_size, temperatures)
        self.inner = TopK(vocab_size, temperatures, **options)

    def config(self):
        return self.inner.config()

    def select(self, logits, key):
        return self.inner.select(logits, key)

    def encode(self, labels):
        return self.inner.encode(labels)

    def decode(self, data, units, wanted):
        return self.inner.decode(data, units, wanted)


def logits(rows, seed, masked=0):
    z = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    z[:, VOCAB - masked :] = -torch.inf
    return z


def write(path, sizes, codec="topk", masked=0, **options):
    """Record i has ``sizes[i]`` rows and the key i; every third one has ``masked`` columns of -inf."""
    with kdfast.cache.Writer(path, vocab_size=VOCAB, codec=codec, **options) as writer:
        for i, rows in enumerate(sizes):
            writer.add(i, logits(rows, i, masked if i % 3 == 0 else 0))
    return kdfast.cache.open(path)


def assert_same(got, want):
    assert repr(got) == repr(want)
    for field in ("values", "ids", "offsets", "tails"):
        ours, theirs = getattr(got, field), getattr(want, field)
        assert ours is theirs is None or torch.equal(ours, theirs), field
        assert ours is None or ours.dtype == theirs.dtype


@pytest.mark.parametrize(("codec", "options"), CODECS)
@pytest.mark.parametrize("masked", [0, 9])
@pytest.mark.parametrize(("block_rows", "shard_bytes"), [(1, 1), (4, 500), (8, 2**20)])
def test_gathering_is_reading_one_at_a_time(tmp_path, codec, options, masked, block_rows, shard_bytes):
    sizes = [0, 1, 3, 1, 0, 2, 7, 1, 1, 5, 1, 0]
    cache = write(tmp_path, sizes, codec, masked, block_rows=block_rows, shard_bytes=shard_bytes, **options)
    rng = np.random.default_rng(0)
    for count in (1, 2, 30):
        keys = rng.integers(0, len(sizes), count).tolist()
        got = cache.gather(keys)
        assert_same(got, SoftLabels.cat([cache[key] for key in keys]))
        assert_same(cache.gather(cache.index(keys)), got)
        assert len(got) == sum(sizes[key] for key in keys)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=12), block_rows=st.integers(1, 9))
def test_rows_are_those_that_were_written(tmp_path_factory, data, sizes, block_rows):
    path = tmp_path_factory.mktemp("cache")
    cache = write(path, sizes, "dense", block_rows=block_rows, shard_bytes=data.draw(st.sampled_from([1, 150, 9999])))
    keys = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=20))
    got = cache.gather(keys).values
    want = torch.cat([got[:0], *(logits(sizes[key], key).log_softmax(1) for key in keys)])
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=0.15)


@pytest.mark.parametrize("codec", ["topk", "by block"])
def test_width_is_known_exactly_where_no_row_is_short(tmp_path, codec):
    cache = write(tmp_path, [1] * 9, codec, masked=9, block_rows=2, k=4)
    full, short = [1, 2, 7, 4, 1], [1, 3]
    assert cache.gather(full).width == 4
    assert cache.gather(short).width is None
    assert cache.gather(short).offsets.tolist() == [0, 4, 6]
    got = cache.gather(full)
    ragged = SoftLabels.topk(got.ids, got.values, got.tails, vocab_size=VOCAB, offsets=got.offsets)
    for ours, theirs in zip(got.at(1.0), ragged.at(1.0), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_block_is_checked_when_it_is_first_read_and_then_never_again(tmp_path):
    cache = write(tmp_path, [1] * 12, "dense", block_rows=4)
    cache.gather([0, 9])  # of the first and the last block
    path = tmp_path / "shard-0-00000.safetensors"
    payload = read_container(path).payload_start
    with path.open("r+b") as file:
        for row in range(12):
            place = payload + row * (VOCAB + 4) + 4
            file.seek(place)
            column, code = next((at, code) for at, code in enumerate(file.read(VOCAB)) if 1 < code < 254)
            file.seek(place + column)
            file.write(bytes([code ^ 1]))  # which is a row still
    cache.gather([1, 0, 10])
    with pytest.raises(kdfast.cache.CacheCorruptError, match="block 1: CRC is"):
        cache.gather([4])


# ---- an index ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "keys"),
    [
        (2, [5]),
        (-1, [0]),
        (slice(1, 3), [3, 5]),
        ([3, 0, 0], [0, 7, 7]),
        ([], []),
        (np.array([1, 2]), [3, 5]),
        (torch.tensor([1, 2]), [3, 5]),
        (torch.tensor(1), [3]),
        (torch.tensor([True, False, False, True]), [7, 0]),
    ],
)
def test_an_index_is_indexed_by_position(tmp_path, positions, keys):
    cache = write(tmp_path, [1, 2] * 4, "dense", block_rows=3)
    index = cache.index([7, 3, 5, 0])[positions]
    assert repr(index) == f"RecordIndex(records={len(keys)})"
    assert_same(cache.gather(index), cache.gather(keys))


def test_an_index_pickles_and_serves_every_reader_of_the_shards(tmp_path):
    cache = write(tmp_path, [1, 2, 3], "dense")
    index = pickle.loads(pickle.dumps(cache.index([2, 0])))
    for reader in (cache, pickle.loads(pickle.dumps(cache)), kdfast.cache.open(tmp_path)):
        assert_same(reader.gather(index), cache.gather([2, 0]))


def test_an_index_of_other_shards_is_refused(tmp_path):
    cache = write(tmp_path / "a", [1, 2, 3], "dense")
    index = cache.index([2, 0])
    grown = write(tmp_path / "a", [1, 2, 3, 4], "dense")
    for reader in (grown, write(tmp_path / "b", [1, 2], "dense")):
        with pytest.raises(kdfast.cache.CacheError, match="the index was made for other shards than these"):
            reader.gather(index)
    assert len(copy.deepcopy(cache).gather(index)) == 4


def test_a_missing_key_is_named_when_it_is_looked_up(tmp_path):
    cache = write(tmp_path, [1], "dense")
    with pytest.raises(KeyError, match="'b' is not in"):
        cache.index([0, "b"])
    with pytest.raises(KeyError, match=r"ids \[4, 5\] of shape \(2,\) is not in"):
        cache.gather(torch.tensor([[4, 5]]))


# ---- keys in a matrix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_a_matrix_of_ids_is_a_key_per_row(dtype):
    ids = torch.randint(0, 99, (5, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    for matrix in (ids, ids.T, ids[:, ::2], ids[:0], ids[:, :0], ids.numpy(), ids.numpy().T):
        assert make_keys(matrix) == [make_key(row) for row in matrix]


def test_a_matrix_that_is_no_ids_is_refused():
    with pytest.raises(TypeError, match=r"must be 2-D integers, got float32 of shape \(2, 3\)"):
        make_keys(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"lie in \[0, 2\*\*32\), got -1 to 3"):
        make_keys(torch.tensor([[0, 3], [-1, 2]]))
    with pytest.raises(TypeError, match=r"must be 1-D integers, got int64 of shape \(\)"):
        make_keys(torch.arange(3))


# ---- damage -----------------------------------------------------------------------------------------------------


def test_a_bad_row_among_many_is_named_by_its_block(tmp_path):
    write(tmp_path, [1] * 8, "dense", block_rows=2, shard_bytes=140)
    (tmp_path / "manifest.json").unlink()
    shard = tmp_path / "shard-0-00001.safetensors"
    payload = bytearray(b"".join(bytes(4 + VOCAB) for _ in range(4)))
    payload[45:49] = np.float32(np.nan).tobytes()  # the step of the last row
    crc = np.array([_C.crc32c(bytes(payload[:30])), _C.crc32c(bytes(payload[30:]))])
    repack(shard, payload=bytes(payload), block_crc=crc)
    cache = kdfast.cache.open(tmp_path)
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"shard-0-00001.safetensors: block 1: a row's step"):
        cache.gather(range(8))
    assert len(cache.gather(range(7))) == 7


def test_blocks_whose_rows_do_not_fill_them_are_refused(tmp_path):
    write(tmp_path, [2, 2], "dense", block_rows=2)
    (tmp_path / "manifest.json").unlink()
    shard = tmp_path / "shard-0-00000.safetensors"
    index = np.array([[0, 29, 0, 2], [29, 31, 2, 2]])
    payload = bytes(60)
    repack(shard, payload=payload, block_index=index, block_crc=np.array([_C.crc32c(bytes(29)), _C.crc32c(bytes(31))]))
    with pytest.raises(kdfast.cache.CacheCorruptError, match="block 0: 2 rows of 15 bytes expected, found 29 bytes"):
        kdfast.cache.open(tmp_path)
