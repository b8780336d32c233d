"""The files: valid safetensors, deterministic, and no damage goes unnoticed."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

import kdfast.cache
from kdfast import _C
from kdfast.cache.format.container import read_container
from support.repack import repack

NAME = "shard-0-00000.safetensors"


def write_small(path, codec="topk", **options):
    """Two blocks of two records each, one of them empty; 7 columns."""
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    with kdfast.cache.Writer(path, vocab_size=7, codec=codec, teacher="t", block_rows=4, **options) as writer:
        writer.add(torch.tensor([1, 2]), logits[:2])
        writer.add("three", logits[2:5])
        writer.add(b"nothing", logits[:0])
        writer.add(4, logits[5:9])
    return path


@pytest.fixture
def small(tmp_path):
    """A shard of 9 rows alone in its directory: no manifest."""
    write_small(tmp_path, k=3)
    (tmp_path / "manifest.json").unlink()
    return tmp_path / NAME


def open_and_verify(path):
    kdfast.cache.open(path.parent).verify()


@pytest.mark.parametrize(
    ("data", "crc"), [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)]
)
def test_crc32c_known_answers(data, crc):
    assert _C.crc32c(data) == crc
    assert all(_C.crc32c(data[cut:], _C.crc32c(data[:cut])) == crc for cut in range(len(data)))


def overwrite(path, position, byte):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([byte]))


def test_every_bit_flip_is_detected_and_named(small):
    good = small.read_bytes()
    container = read_container(small)
    payload = range(container.payload_start, container.payload_start + container.payload_bytes)
    index = container.tables["block_index"]
    for position in range(len(good)):
        for bit in range(8):
            overwrite(small, position, good[position] ^ 1 << bit)
            with pytest.raises(kdfast.cache.CacheCorruptError) as caught:
                open_and_verify(small)
            assert str(small) in str(caught.value)
            if position in payload:
                block = np.searchsorted(index[:, 0], position - payload.start, side="right") - 1
                assert f"block {block}:" in str(caught.value)
        overwrite(small, position, good[position])
    assert small.read_bytes() == good
    open_and_verify(small)


def test_truncation_at_every_length_is_detected(small):
    good = small.read_bytes()
    for length in range(len(good)):
        small.write_bytes(good[:length])
        with pytest.raises(kdfast.cache.CacheCorruptError, match=NAME):
            open_and_verify(small)
    small.write_bytes(good + b"\0")
    with pytest.raises(kdfast.cache.CacheCorruptError, match="truncated or corrupt"):
        open_and_verify(small)


def test_a_damaged_block_fails_when_it_is_read_and_leaves_the_others(small):
    bad = bytearray(small.read_bytes())
    bad[read_container(small).payload_start] ^= 1
    small.write_bytes(bad)
    cache = kdfast.cache.open(small.parent)
    assert len(cache[4]) == 4
    for _ in range(2):  # not only the first time
        with pytest.raises(kdfast.cache.CacheCorruptError, match=f"{NAME}: block 0: CRC is .*, the index says"):
            cache[torch.tensor([1, 2])]


def test_safetensors_opens_a_shard(small):
    with safe_open(small, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (metadata["format"], metadata["version"]) == ("kdfast-cache", "1")
    assert json.loads(metadata["codec_config"]) == {"k": 3, "value_dtype": "float16"}
    assert tensors["payload"].size == 9 * (3 * 2 + 3 * 2 + 4)
    assert tensors["block_index"].tolist() == [[0, 80, 0, 5], [80, 64, 5, 4]]
    assert tensors["record_spans"].tolist() == [[0, 2], [2, 3], [5, 0], [5, 4]]
    assert tensors["record_keys"].shape == (4, 16)
    for (offset, length, *_), crc in zip(tensors["block_index"], tensors["block_crc"], strict=True):
        assert _C.crc32c(tensors["payload"][offset : offset + length]) == crc


@pytest.mark.parametrize("codec", ["topk", "dense"])
def test_same_input_same_bytes(tmp_path, codec):
    first, second = (write_small(tmp_path / name, codec) for name in "ab")
    assert sorted(p.name for p in first.iterdir()) == ["cache.json", "index.safetensors", "manifest.json", NAME]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


BIG = 2**62
HOSTILE = {
    "block past the end": {"block_index": np.array([[0, 80, 0, 5], [80, 65, 5, 4]])},
    "negative length": {"block_index": np.array([[0, -80, 0, 5], [-80, 224, 5, 4]])},
    "huge length": {"block_index": np.array([[0, BIG, 0, 5], [BIG, BIG, 5, 4]])},
    "overlapping blocks": {"block_index": np.array([[0, 80, 0, 5], [0, 64, 5, 4]])},
    "rows that overflow": {"block_index": np.array([[0, 80, 0, BIG], [80, 64, BIG, BIG]])},
    "empty block": {"block_index": np.array([[0, 80, 0, 9], [80, 64, 9, 0]])},
    "record across blocks": {"record_spans": np.array([[0, 2], [2, 4], [6, 0], [6, 3]])},
    "record past the end": {"record_spans": np.array([[0, 2], [2, 3], [5, 0], [5, 5]])},
    "negative record": {"record_spans": np.array([[0, 2], [2, -3], [-1, 6], [5, 4]])},
    "missing keys": {"record_keys": np.zeros((3, 16), np.uint8)},
    "missing CRCs": {"block_crc": np.zeros(1, np.uint32)},
    "no tables": {"block_index": np.zeros((0, 4)), "block_crc": np.zeros(0)},
    "metadata not JSON": {"metadata": {"codec_config": "{"}},
    "metadata too deep": {"metadata": {"temperatures": "[" * 100000}},
    "vocabulary not a number": {"metadata": {"vocab_size": "many"}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tables_are_refused(small, changes):
    repack(small)
    open_and_verify(small)
    repack(small, **changes)
    with pytest.raises(kdfast.cache.CacheCorruptError, match=NAME):
        kdfast.cache.open(small.parent)


def test_a_well_sealed_block_that_the_codec_refuses_is_named(small):
    payload = b"\xff\xff\xff\xff\xff\xff" + bytes(10)  # one row: three ids, three values, a tail
    payload *= 9
    repack(small, payload=payload, block_crc=np.array([_C.crc32c(payload[:80]), _C.crc32c(payload[80:])]))
    with pytest.raises(kdfast.cache.CacheCorruptError, match=f"{NAME}: block 1: id 65535 is outside the vocabulary"):
        kdfast.cache.open(small.parent)[4]


HEADERS = {
    "not JSON": b"{",
    "not an object": b"[]",
    "nested": b"[" * 10000,
    "not UTF-8": b"\xff\xfe\xfd",
    "no metadata": b"{}",
    "metadata a list": b'{"__metadata__":[]}',
    "numbers in the metadata": b'{"__metadata__":{"a":1}}',
    "no tensors": b'{"__metadata__":{}}',
    "tensor a number": b'{"__metadata__":{},"payload":3}',
    "three offsets": b'{"__metadata__":{},"payload":{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}}',
    "negative size": b'{"__metadata__":{},"payload":{"dtype":"U8","shape":[-1],"data_offsets":[0,-1]}}',
    "fraction": b'{"__metadata__":{},"payload":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1.5]}}',
    "wrong type": b'{"__metadata__":{},"payload":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_hostile_headers_are_refused(small, header):
    small.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(kdfast.cache.CacheCorruptError, match=NAME):
        kdfast.cache.open(small.parent)


def test_tensors_must_follow_one_another(small):
    good = small.read_bytes()
    for old, new in [(b'"payload"', b'"payloae"'), (b'"seal"', b'"sael"'), (b"[0,144]", b"[8,152]")]:
        small.write_bytes(good.replace(old, new, 1))
        with pytest.raises(kdfast.cache.CacheCorruptError, match=r"its header lacks|do not follow"):
            kdfast.cache.open(small.parent)


def test_another_version_or_format_is_not_called_corrupt(small):
    for metadata, message in [({"version": "2"}, "version 2, this kdfast reads 1"), ({"format": "x"}, "format is 'x'")]:
        repack(small, metadata=metadata)
        with pytest.raises(kdfast.cache.CacheError, match=message) as caught:
            kdfast.cache.open(small.parent)
        assert not isinstance(caught.value, kdfast.cache.CacheCorruptError)


def test_an_unknown_codec_is_named(small):
    repack(small, metadata={"codec": "later"})
    with pytest.raises(kdfast.cache.CacheError, match=r"cannot be decoded: codec must be one of .* got 'later'"):
        kdfast.cache.open(small.parent)


def test_the_manifest_notices_missing_and_replaced_shards(tmp_path):
    write_small(tmp_path / "a", k=3)
    write_small(tmp_path / "b", k=2)
    shard, other = tmp_path / "a" / NAME, tmp_path / "b" / NAME
    shard.write_bytes(other.read_bytes())
    with pytest.raises(kdfast.cache.CacheCorruptError, match=f"{NAME}: is not the file that manifest.json lists"):
        kdfast.cache.open(tmp_path / "a")
    shard.unlink()
    with pytest.raises(kdfast.cache.CacheCorruptError, match=f"{NAME}: is listed in manifest.json but not there"):
        kdfast.cache.open(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shards": [1]}', '{"shards": [{}]}', "[" * 100000])
def test_a_broken_manifest_is_named(tmp_path, text):
    write_small(tmp_path, k=3)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(kdfast.cache.CacheCorruptError, match=r"manifest.json: cannot be read"):
        kdfast.cache.open(tmp_path)


def test_topk_bytes_are_those_of_the_format_page(tmp_path):
    logits = torch.tensor([[0.0, math.log(2), -math.inf]])
    with kdfast.cache.Writer(tmp_path, vocab_size=3, codec="topk", k=3, temperatures=(1.0, 2.0)) as writer:
        writer.add("x", logits)
    with safe_open(tmp_path / NAME, framework="np") as file:
        payload = file.get_tensor("payload").tobytes()
    ids, values, tails = payload[:6], payload[6:12], payload[12:]
    assert ids.hex() == "010000000000"
    assert values == np.array([math.log(2 / 3), math.log(1 / 3), -np.inf], "<f2").tobytes()
    assert tails == np.array([-np.inf, -np.inf], "<f4").tobytes()
