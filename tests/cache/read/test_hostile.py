"""Caches made to do harm, with right checksums: named errors, and no more memory than they are worth."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

import kdfast.cache
from kdfast._C import crc32c
from kdfast.cache import CacheCorruptError, CacheError, codecs
from kdfast.cache.codecs.model import IdOrder, Statistics, pack_statistics
from kdfast.cache.format.container import pack, pack_sealed, read_container
from kdfast.cache.format.keys import Key
from kdfast.cache.format.sorted_keys import INDEX, LAYOUT
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.labels.head import OutputLayer
from support import ROOT
from support.repack import repack

V1 = ROOT / "tests" / "fixtures" / "v1"
SHARD = "shard-0-00000.safetensors"


@pytest.fixture
def stored(tmp_path):
    def copy(name):
        shutil.copytree(V1 / name, tmp_path / name)
        return tmp_path / name

    return copy


# ---- what a file claims ---------------------------------------------------------------------------------------------


def certain(fields):
    """Frequencies of a model to which only 0 is likely."""
    counts = np.zeros((fields + 576, 256), np.uint32)
    counts[:, 0] = 10**8
    return counts


def claim_rows(path, rows):
    """A cache of some hundred bytes: one record of one row, and one of all others, none of which has an entry."""
    codec = codecs.create("threshold", 40, (1.0,), {"tau": 1.0})
    model = pack_statistics(Statistics.of(certain(1), 1, np.zeros(40, np.uint8)))
    codec.use_model(model)
    block = codec._model.encode(np.zeros((rows, 1), np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    with kdfast.cache.Writer(path, vocab_size=40, codec="threshold", tau=1.0) as writer:
        writer.add(0, torch.zeros(1, 40))
        writer.add(1, torch.zeros(1, 40))
    repack(
        path / SHARD,
        payload=block,
        block_index=np.array([[0, len(block), 0, rows]]),
        record_spans=np.array([[0, 1], [1, rows - 1]]),
        block_crc=np.array([crc32c(block)], np.uint32),
        codec_model=np.frombuffer(model, np.uint8),
        metadata={"x": ""},
    )
    before = read_container(path / SHARD)
    metadata = {name: text for name, text in before.metadata.items() if name not in ("spans", "x")}
    tables = {name: table for name, table in before.tables.items() if name != "padding"}
    head, tail = pack(metadata, len(block), tables)
    (path / SHARD).write_bytes(head + block + tail)
    return len(block)


def test_far_more_rows_than_bytes_are_read_on_request_only(tmp_path):
    size = claim_rows(tmp_path, 300_000)
    assert size < 400
    with pytest.raises(CacheError, match=r"block 0: claims 300000 rows in \d+ bytes, .*open it with trusted=True"):
        kdfast.cache.open(tmp_path)
    cache = kdfast.cache.open(tmp_path, trusted=True)
    assert (len(cache[0]), cache.info.rows) == (1, 300_000)


def test_blocks_of_up_to_65536_equal_rows_need_no_trust(tmp_path):
    claim_rows(tmp_path, 65536)
    assert len(kdfast.cache.open(tmp_path)[0]) == 1


def test_room_for_entries_does_not_follow_from_how_many_a_row_may_have():
    """4,000 rows of one entry each, where each may have 100,000: that was 1.6 GB."""
    vocab, rows = 100_000, 4000
    probs = torch.rand(1, vocab, generator=torch.Generator().manual_seed(0))
    table = PrototypeTable.of(probs / probs.sum(), probs)
    codec = codecs.create("prototype", vocab, (1.0,), {"prototypes": table, "k": vocab})
    headers = torch.tensor([[1, 0, 20]]).repeat(rows, 1).int()
    labels = codec.to_labels(headers, torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32))
    torch.testing.assert_close(labels.values + labels.tails[0].exp(), torch.ones(rows))


def test_rows_of_many_and_of_no_entries_have_the_same_shares_together_and_alone():
    table = PrototypeTable.of(torch.full((1, 50), 0.02), torch.full((1, 50), 0.02))
    codec = codecs.create("prototype", 50, (1.0,), {"prototypes": table, "k": 40})
    counts, draw = [0, 1, 40, 2, 17, 0], np.random.default_rng(0)
    headers = torch.tensor([[n, 0, 30] for n in counts]).int()
    ids = torch.cat([torch.arange(n) for n in counts]).int()
    values = torch.cat([torch.tensor([*draw.integers(0, 49, max(n - 1, 0)), 0][: n or None][:n]) for n in counts]).int()
    together = codec.to_labels(headers, ids, values)
    start = 0
    for at, n in enumerate(counts):
        alone = codec.to_labels(headers[at : at + 1], ids[start : start + n], values[start : start + n])
        assert torch.equal(alone.values, together.values[start : start + n])
        left, expected = 1 - torch.sigmoid(torch.tensor((30 - 24) * 0.5, dtype=torch.float64)), []
        for turn, value in enumerate(values[start : start + n].tolist()):
            share = torch.sigmoid(torch.tensor((value - 24) * 0.5, dtype=torch.float64)) if turn < n - 1 else 1.0
            expected.append(float(left * share))
            left = left * (1 - share)
        torch.testing.assert_close(alone.values, torch.tensor(expected), rtol=1e-4, atol=0)
        start += n


@pytest.mark.parametrize("size", [1, 5, 2**18, 2**18 + 1, 600_000])
def test_ids_are_ordered_by_class_in_parts(size):
    classes = np.random.default_rng(0).integers(0, 32, size).astype(np.uint8)
    expected = np.argsort(classes, kind="stable")
    assert np.array_equal(IdOrder.by_class(classes).ids[0], expected)


# ---- metadata -------------------------------------------------------------------------------------------------------

METADATA = [
    *(
        ("topk", {"vocab_size": text})
        for text in (" 40 ", "4_0", "+40", "040", "\u0664\u0660", "0", "16777217", "1e1", "", "-1")
    ),
    *(
        ("topk", {"temperatures": text})
        for text in (
            '["1", 2.0]',
            "[true, 2.0]",
            '{"1": 2, "2": 1}',
            "[1e-320, 2.0]",
            "[1e39, 2.0]",
            "[1" + "0" * 400 + ", 2.0]",
            "[NaN, 2.0]",
            "[Infinity, 2.0]",
            "[0, 2.0]",
            "[]",
            "1.0",
            "null",
            "[" * 100_000,
        )
    ),
    *(
        ("topk", {"targets": json.dumps(value)})
        for value in (
            {"cross_entropy_sum": 1.0, "count": -5},
            {"cross_entropy_sum": 1.0, "count": 10**38},
            {"cross_entropy_sum": 1.0, "count": 2.5},
            {"cross_entropy_sum": 1.0, "count": True},
            {"cross_entropy_sum": float("nan"), "count": 2},
            {"cross_entropy_sum": float("inf"), "count": 2},
            {"cross_entropy_sum": -1.0, "count": 2},
            {"cross_entropy_sum": "1", "count": 2},
            {"cross_entropy_sum": 1.0},
            {"cross_entropy_sum": 1.0, "count": 2, "more": 1},
            [1.0, 2],
        )
    ),
    ("topk", {"codec_config": '{"k": 5, "k": 5, "value_dtype": "float16"}'}),
    ("topk", {"codec_config": '{"k": 5.0, "value_dtype": "float16"}'}),
    ("topk", {"codec_config": '{"k": 5, "value_dtype": "float16", "more": 1}'}),
    ("topk", {"codec_config": '{"k": 5}'}),
    ("topk", {"codec_config": "[]"}),
    ("topk", {"codec_config": "[" * 100_000}),
    ("topk", {"first_record": "0"}),
    ("dense", {"codec_config": '{"max_error": Infinity}'}),
    ("dense", {"codec_config": '{"max_error": 1e400}'}),
    ("dense", {"codec_config": '{"max_error": 1' + "0" * 400 + "}"}),
    ("dense", {"codec_config": '{"max_error": true}'}),
    ("dense", {"vocab_size": "41"}),
    ("dense-4", {"vocab_size": "42"}),
    ("sample-blocks", {"vocab_size": "41"}),
    ("sample-rows", {"vocab_size": "2"}),
    ("prototype-plain", {"vocab_size": "41"}),
    ("prototype-plain", {"codec_config": '{"shapes": "../../x"}'}),
    ("prototype-plain", {"codec_config": '{"shapes": ["x"]}'}),
    ("hidden", {"codec_config": '{"bits":16,"head":"' + "0" * 32 + '","width":' + "9" * 300 + "}"}),
    ("sample-plain", {"codec_config": '{"coding":"plain","draws":' + "9" * 300 + ',"seed":0}'}),
]


@pytest.mark.parametrize(("name", "change"), METADATA)
def test_metadata_are_as_a_writer_spells_them(stored, name, change):
    path = stored(name)
    repack(path / SHARD, change)
    with pytest.raises(CacheError, match=name):
        kdfast.cache.open(path)


def test_a_head_of_another_vocabulary_is_refused(tmp_path):
    weight = torch.randn(11, 4)
    layer = OutputLayer(weight)
    options = {"codec": "hidden", "width": 4, "head": layer.fingerprint}
    with kdfast.cache.Writer(tmp_path, vocab_size=11, **options) as writer:
        writer.add("a", torch.randn(2, 4))
    assert len(kdfast.cache.open(tmp_path, head=layer)["a"]) == 2
    repack(tmp_path / SHARD, {"vocab_size": "16777216"})
    with pytest.raises(CacheError, match="16777216 columns"):
        kdfast.cache.open(tmp_path, head=layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("shards"),
        lambda manifest: manifest.pop("version"),
        lambda manifest: manifest.pop("format"),
        lambda manifest: manifest.update(version=2),
        lambda manifest: manifest.update(version=1.0),
        lambda manifest: manifest.update(version=True),
        lambda manifest: manifest.update(shards={}),
        lambda manifest: manifest.update(shards=None),
        lambda manifest: manifest["shards"].append(manifest["shards"][0]),
        lambda manifest: manifest["shards"].append([]),
        lambda manifest: manifest["shards"][0].update(bytes=float(manifest["shards"][0]["bytes"])),
        lambda manifest: manifest["shards"][0].update(records=True),
        lambda manifest: manifest["shards"][0].update(rows=-1),
        lambda manifest: manifest["shards"][0].update(seal=manifest["shards"][0]["seal"].upper() + " "),
        lambda manifest: manifest["shards"][0].update(name="../shard-0-00000.safetensors"),
        lambda manifest: manifest["shards"][0].update(name="/etc/passwd"),
        lambda manifest: manifest["shards"][0].update(name=["x"]),
        lambda manifest: manifest["shards"][0].update(more=1),
    ],
)
def test_a_manifest_is_as_a_writer_spells_it(stored, change):
    path = stored("topk")
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"manifest\.json: ") as caught:
        kdfast.cache.open(path)
    assert "Error(" not in str(caught.value)


def test_headers_are_json_in_utf8(stored):
    path = stored("topk")
    data = (path / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode()
    for bad in (text.encode("utf-16-le"), b" " + text.encode(), (text.rstrip()[:-1] + ',"seal":0}').encode()):
        (path / SHARD).write_bytes(len(bad).to_bytes(8, "little") + bad + data[8 + length :])
        with pytest.raises(CacheCorruptError, match=SHARD):
            kdfast.cache.open(path)


# ---- what is no file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", INDEX, SHARD, "shapes-b61c400c7003a5318f815fd645a5e57d.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "directory", "link to a pipe"])
def test_pipes_and_devices_are_not_opened(stored, name, kind):
    path = stored("prototype-rows")
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "zero":
        (path / name).symlink_to("/dev/zero")
    elif kind == "directory":
        (path / name).mkdir()
    else:
        os.mkfifo(path / "pipe")
        (path / name).symlink_to("pipe")
    if name == INDEX:  # which is derived, and not needed
        cache = kdfast.cache.open(path)
        assert "is no regular file" in cache.info.index
        with pytest.raises(CacheCorruptError, match=f"{name}: is no regular file"):
            cache.verify()
        return
    with pytest.raises(CacheCorruptError, match=f"{name}: is no regular file"):
        kdfast.cache.open(path)


def test_links_to_files_are_followed(stored, tmp_path):
    path = stored("topk")
    (path / SHARD).rename(tmp_path / "elsewhere")
    (path / SHARD).symlink_to(tmp_path / "elsewhere")
    assert len(kdfast.cache.open(path)[0]) == 40


# ---- the index ------------------------------------------------------------------------------------------------------


def reindex(path, change):
    """Change the tables of an index in place; its checksums, and the shards that it says it is of, stay right."""
    container = read_container(path / INDEX, LAYOUT)
    tables = {name: container.tables[name].copy() for name in ("prefixes", "records", "duplicates")}
    change(tables)
    (path / INDEX).write_bytes(b"".join(pack_sealed(container.metadata, tables, LAYOUT)))


@pytest.fixture
def many(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=5, codec="hard") as writer:
        for key in range(200):
            writer.add(key, torch.eye(5)[key % 5][None])
    return tmp_path


def test_the_index_of_another_cache_is_not_served(many):
    reindex(many, lambda tables: tables.update(prefixes=np.sort(tables["prefixes"] ^ np.uint64(1 << 60))))
    cache = kdfast.cache.open(many)
    assert cache.info.index.endswith("names other keys than those of the shards")
    assert all(key in cache for key in range(200))
    with pytest.raises(CacheCorruptError, match="is not the index of the shards"):
        cache.verify()


def test_verify_compares_every_key(many):
    kdfast.cache.open(many).verify()

    def swap(tables):
        tables["records"][[1, 2]] = tables["records"][[2, 1]]

    reindex(many, swap)
    with pytest.raises(CacheCorruptError, match="is not the index of the shards"):
        kdfast.cache.open(many).verify()


@pytest.mark.parametrize("record", [-1, 200, 2**62, -(2**63)])
def test_records_that_are_not_there_are_named(many, record):
    reindex(many, lambda tables: tables["records"].__setitem__(slice(1, 3), record))
    cache = kdfast.cache.open(many)
    prefixes = read_container(many / INDEX, LAYOUT).tables["prefixes"]
    for at in (1, 2):
        wrong = Key(int(prefixes[at]).to_bytes(8, "little") + bytes(8))
        with pytest.raises(CacheCorruptError, match="names records that the cache does not have"):
            cache[wrong]


@pytest.mark.parametrize(
    "name",
    ["shard-0-\u0660\u0661\u0662\u0663\u0664.safetensors", "shard-0-000001.safetensors", "shard-0-1.safetensors"],
)
def test_only_a_writers_names_are_shards(stored, name):
    path = stored("topk")
    shutil.copy(path / SHARD, path / name)
    assert kdfast.cache.open(path).info.shards == 1
