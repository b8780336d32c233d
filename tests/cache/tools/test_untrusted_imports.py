"""Imports of files that claim what they do not hold: named errors, before room is made for it."""

import io
import json
import os
import random
import struct
import tarfile
import zipfile

import pytest
import torch

import kdfast.cache
from kdfast.cache import CacheCorruptError, CacheError
from kdfast.cache.convert import DistillKit, ExpansionError, Megatron, TopKLogProbs, import_records
from kdfast.cache.convert.distillkit_layout import read_layout

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")


def saved(**lists):
    buffer = io.BytesIO()
    torch.save(lists, buffer)
    return buffer.getvalue()


def rows(count=3, k=2):
    return {
        "values": [torch.full((count, 1, k), -1.0)],
        "indices_low": [torch.arange(count * k).view(count, 1, k).to(torch.uint16)],
        "bit_17": [torch.zeros(count, 1, k, dtype=torch.bool)],
    }


def shard(path, data, meta=None, member=None):
    """A folder with one tar, and the tokens of its one sample of three rows."""
    path.mkdir()
    saver = json.dumps({"saver": {"k": 2, **(meta or {})}}).encode()
    with tarfile.open(path / "cp0_dp0__1.tar", "w") as tar:
        for name, content in (("_meta.json", saver), ("1.pt.zst", zstandard.compress(data))):
            info = member if member is not None and name != "_meta.json" else tarfile.TarInfo(name)
            info.size = len(content) if member is None or name == "_meta.json" else info.size
            tar.addfile(info, io.BytesIO(content))
    line = {"iteration": 1, "dp": 0, "microbatch": 0, "sample": 0, "input_ids": [1, 2, 3]}
    (path / "tokens.jsonl").write_text(json.dumps(line))
    return path, path / "tokens.jsonl"


def test_a_good_shard_is_read(tmp_path):
    (record,) = Megatron(*shard(tmp_path / "a", saved(**rows())))
    assert record.ids.tolist() == [0, 1, 2, 3, 4, 5]


def test_compressed_zeros_are_bounded(tmp_path):
    folder = shard(tmp_path / "a", bytes(2**21))
    with pytest.raises(ExpansionError, match=r"iteration 1: goes on .*max_bytes allows 1,000,000.*larger max_bytes"):
        list(Megatron(*folder, max_bytes=10**6))
    with pytest.raises(CacheCorruptError, match="is not what Megatron-Core writes"):
        list(Megatron(*folder))


def test_a_zip_within_is_not_inflated(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(CacheCorruptError, match=r"is compressed, which torch.save does not do"):
        list(Megatron(*shard(tmp_path / "a", buffer.getvalue())))


def test_strides_of_zero_stand_for_no_values(tmp_path):
    lists = {name: [tensor[0][:1, :1, :1].expand(100_000, 300, 2)] for name, tensor in rows().items()}
    with pytest.raises(CacheCorruptError, match="tensors of 60000000 values that the file does not hold"):
        list(Megatron(*shard(tmp_path / "a", saved(**lists))))


def test_sparse_and_cut_members_are_refused(tmp_path):
    info = tarfile.TarInfo("1.pt.zst")
    info.size = 10**12
    path, tokens = tmp_path / "a", tmp_path / "a" / "tokens.jsonl"
    shard(path, b"")
    with (path / "cp0_dp0__1.tar").open("wb") as file:
        meta = tarfile.TarInfo("_meta.json")
        content = json.dumps({"saver": {"k": 2}}).encode()
        meta.size = len(content)
        file.write(meta.tobuf() + content.ljust(512, b"\0") + info.tobuf() + bytes(1024))
    with pytest.raises(CacheCorruptError, match=r"'1.pt.zst' claims 1000000000000 bytes in a file of"):
        list(Megatron(path, tokens))
    with (path / "cp0_dp0__1.tar").open("wb") as file:
        sparse = tarfile.TarInfo("1.pt.zst")
        sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
        header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"00000000000\0" + b"00000001000\0"  # 512 bytes at 0
        header[483:495] = b"77777777777\0"  # of 8 GiB
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        file.write(meta.tobuf() + content.ljust(512, b"\0") + bytes(header) + bytes(512) + bytes(1024))
    with pytest.raises(CacheCorruptError, match="has holes"):
        list(Megatron(path, tokens))


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "2", 10**400, None])
def test_a_number_of_entries_is_one(tmp_path, k):
    with pytest.raises(CacheCorruptError, match=r"does not say k|no number of entries"):
        Megatron(*shard(tmp_path / "a", b"", {"k": k}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"iteration": 1e999}', "[]", '{"iteration": Infinity}'])
def test_tokens_that_are_none_are_named(tmp_path, text):
    path, tokens = shard(tmp_path / "a", saved(**rows()))
    tokens.write_text(text)
    with pytest.raises(CacheError, match="line 1 is not a sample's tokens"):
        Megatron(path, tokens)


# ---- Parquet and text ------------------------------------------------------------------------------------------------


def parquet(path, **columns):
    from pyarrow import parquet as format

    format.write_table(pyarrow.table(columns), path)
    return path


def test_runs_of_one_value_are_bounded(tmp_path):
    ids, values = [[7] * 200_000], [[{"token": 7, "logprob": -1.0}]] * 1
    path = parquet(tmp_path / "a.parquet", input_ids=ids, logprobs=[values])
    assert path.stat().st_size < 10_000
    with pytest.raises(ExpansionError, match=r"a.parquet: row group 0: takes 1,6.* max_bytes allows 1,000,000"):
        TopKLogProbs(path, "next", max_bytes=10**6)


def test_texts_of_a_dictionary_are_bounded(tmp_path):
    text = "9" * 100_000
    entries = [[[{"token": text, "logprob": -1.0}]] * 300]
    path = parquet(tmp_path / "a.parquet", input_ids=[[7] * 300], logprobs=entries)
    assert path.stat().st_size < 20_000
    with pytest.raises(ExpansionError, match=r"row group 0: takes 3\d,"):
        TopKLogProbs(path, "next", max_bytes=10**6)


LAYOUT = {"d": 100, "k": 4, "exact_k": 4}


@pytest.mark.parametrize(
    "change",
    [
        *({"d": d} for d in (0, -5, 1, 2**25, 10**400, 4.0, "100", None, True)),
        *({"k": k} for k in (0, 101, -1, 10**12)),
        *({"exact_k": k} for k in (-1, 5)),
        {"exact_dtype": ["float32"]},
        {"exact_dtype": "float8"},
        {"polynomial_terms": [10**9], "exact_k": 1},
        {"polynomial_terms": [[1]], "exact_k": 1},
        {"residual_bins": [{"scale_dtype": "float32", "element_bits": 65, "num_elements": 1}], "exact_k": 1},
        {"residual_bins": [{"scale_dtype": "float32", "element_bits": 0, "num_elements": 1}], "exact_k": 1},
        {"residual_bins": [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 9}], "exact_k": 1},
    ],
)
def test_a_layout_of_impossible_sizes_is_refused(tmp_path, change):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LAYOUT))
    assert read_layout(path).k == 4
    path.write_text(json.dumps({**LAYOUT, **change}))
    with pytest.raises(CacheError, match=r"config.json: is not a DistillKit compression config"):
        read_layout(path)


@pytest.mark.parametrize("bits", [0, 65])
def test_a_legacy_layout_of_impossible_words_is_refused(tmp_path, bits):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vocab_size": 2**bits, "k": 1, "exact_k": 1, "polynomial_degree": 2}))
    with pytest.raises(CacheError, match="vocab_size must be an integer in"):
        read_layout(path)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_ids": [1, 2], "logprobs": [{"1" * 30: -1.0}]}, "is not a token's id"),
        ({"input_ids": [1, 2], "logprobs": [{"\u0663": -1.0}]}, "is not a token's id"),
        ({"input_ids": [10**30, 2], "logprobs": [{"1": -1.0}]}, "sample 1"),
        ({"input_ids": [[1], [2]], "logprobs": [{"1": -1.0}]}, "no list of ids"),
        ({"input_ids": [1, 2], "logprobs": [5]}, "sample 1"),
        ({"input_ids": [1, 2], "logprobs": [{"1": 10**400}]}, "sample 1"),
        ({"input_ids": [1, 2], "logprobs": 5}, "sample 1"),
    ],
)
def test_samples_that_are_none_are_named(tmp_path, sample, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(sample))
    with pytest.raises(CacheError, match=message):
        TopKLogProbs(path, "next")


def test_deep_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(CacheError, match="line 1 is not JSON"):
        TopKLogProbs(tmp_path / "a.jsonl", "next")


def test_pipes_are_not_opened(tmp_path):
    for name in ("a.jsonl", "a.parquet", "tokens", "config.json"):
        os.mkfifo(tmp_path / name)
    good, _ = shard(tmp_path / "good", saved(**rows()))
    parquet(tmp_path / "b.parquet", input_ids=[[1]])
    for read in (
        lambda: TopKLogProbs(tmp_path / "a.jsonl", "next"),
        lambda: TopKLogProbs(tmp_path / "a.parquet", "next"),
        lambda: Megatron(good, tmp_path / "tokens"),
        lambda: DistillKit(tmp_path / "b.parquet", tmp_path / "config.json"),
    ):
        with pytest.raises(CacheCorruptError, match="is no regular file"):
            read()


def test_the_numbers_of_a_row_are_int64(tmp_path):
    path = parquet(tmp_path / "a.parquet", input_ids=[[1, None]], logprobs=[[[1.0]]], target_token_ids=[[[1]]])
    with pytest.raises(CacheError, match="sample 0"):
        TopKLogProbs(path, "next")


ENTRIES = {"1": -0.5, "2": -1.5}


def imported(source, tmp_path, **options):
    """The labels of the one record of ``source``, by way of a cache."""
    import_records(source, tmp_path / "cache", vocab_size=10, **options)
    return kdfast.cache.open(tmp_path / "cache")


@pytest.mark.parametrize("ids", [[1.5, 2, 3], [True, 2, 3], ["1", "2", "3"], [1, 2, -3], [1, 2, 2**40], [1, 2, 2**70]])
def test_ids_are_never_rounded_or_wrapped(tmp_path, ids):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": ids, "logprobs": [None, ENTRIES, ENTRIES]}))
    with pytest.raises(CacheError, match=r"sample 1: .*its input_ids"):
        TopKLogProbs(tmp_path / "a.jsonl", "position")


def test_whole_numbers_pass_for_ids(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [1.0, 2.0, 3.0], "logprobs": [None, ENTRIES, ENTRIES]}))
    cache = imported(TopKLogProbs(tmp_path / "a.jsonl", "position"), tmp_path)
    assert cache[torch.tensor([1, 2, 3])].ids.tolist() == [1, 2, 1, 2]


def test_a_token_outside_the_vocabulary_breaks_its_record(tmp_path):
    lines = [{"input_ids": [1, 2, last], "logprobs": [None, ENTRIES, ENTRIES]} for last in (30, 3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = TopKLogProbs(tmp_path / "a.jsonl", "position")
    with pytest.raises(CacheError, match="sample 1: row 1: the token after it, 30, is outside the vocabulary of 10"):
        imported(source, tmp_path)
    assert len(imported(source, tmp_path, drop_broken=True)) == 1


def test_an_entry_named_twice_in_json_is_not_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2], "logprobs": [null, {"1": -1, "1": -2}]}')
    with pytest.raises(CacheError, match="line 1 is not JSON: an object of JSON has '1' twice"):
        TopKLogProbs(tmp_path / "a.jsonl", "position")


def captured(folder, values=None, ids=None, config=None, tokens=None):
    """A DistillKit capture of one sample of three tokens: ids 1 and 2 at -0.5 and -1.5 after each."""
    folder.mkdir()
    row = list(struct.pack("<2f", -0.5, -1.5))
    values = pyarrow.array([[row] * 3], pyarrow.list_(pyarrow.list_(pyarrow.uint8()))) if values is None else values
    ids = pyarrow.array([[[0x12]] * 3], pyarrow.list_(pyarrow.list_(pyarrow.uint8()))) if ids is None else ids
    tokens = pyarrow.array([[1, 2, 3]]) if tokens is None else tokens
    parquet(folder / "a.parquet", input_ids=tokens, compressed_logprobs=values, bytepacked_indices=ids)
    known = {"d": 10, "k": 2, "exact_k": 2, "delta_encoding": False}
    (folder / "compression_config.yaml").write_text(json.dumps(known) if config is None else config)
    return DistillKit(folder)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint32"])
def test_bytes_in_wider_integers_are_bytes(tmp_path, dtype):
    of = pyarrow.list_(pyarrow.list_(getattr(pyarrow, dtype)()))
    values = pyarrow.array([[list(struct.pack("<2f", -0.5, -1.5))] * 3], of)
    (record,) = captured(tmp_path / "a", values, pyarrow.array([[[0x12]] * 3], of))
    assert record.ids.tolist() == [1, 2] * 3
    assert record.log_probs.tolist() == [-0.5, -1.5] * 3


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("values", [[[256] + [0] * 7] * 3], "numbers that are no bytes"),
        ("values", [[[None] + [0] * 7] * 3], "or nulls, where bytes are expected"),
        ("values", [[[0.5] * 8] * 3], "float64 or nulls"),
        ("values", [[b"abcdefgh"] * 3], "not lists of numbers"),
        ("values", [[1, 2, 3]], "not lists of numbers"),
        ("tokens", [[1.5, 2, 3]], "input_ids hold 1.5"),
        ("tokens", [["a", "b", "c"]], "no list of ids"),
        ("tokens", [5], "null, or no list"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path, name, column, message):
    with pytest.raises(CacheError, match=f"sample 0: .*{message}"):
        list(captured(tmp_path / "a", **{name: pyarrow.array(column)}))


def test_merge_keys_of_yaml_do_not_multiply(tmp_path):
    levels = [f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)]
    with pytest.raises(CacheError, match="more is merged than a config has"):
        captured(tmp_path / "a", config="a0: &a0 {x: 1}\n" + "".join(levels))
    merged = "base: &base {d: 10, k: 2}\nteacher:\n  <<: *base\n  exact_k: 2\n  delta_encoding: false\n"
    (record,) = captured(tmp_path / "b", config=merged)
    assert record.ids.tolist() == [1, 2] * 3


@pytest.mark.parametrize("config", ["d: !!timestamp 'x'", "d: 2020-13-45"])
def test_yaml_whose_values_are_none_is_named(tmp_path, config):
    with pytest.raises(CacheError, match="is not YAML"):
        captured(tmp_path / "a", config=config)


def test_a_layout_has_few_terms(tmp_path):
    config = json.dumps({"d": 200001, "k": 200000, "exact_k": 0, "polynomial_terms": [0] * 200000})
    with pytest.raises(CacheError, match="200000 polynomial_terms, where at most 64 are read"):
        captured(tmp_path / "a", config=config)


def test_damaged_parquet_is_named(tmp_path):
    captured(tmp_path / "a")
    path = tmp_path / "a" / "a.parquet"
    whole, draw = path.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            list(DistillKit(tmp_path / "a"))
        except CacheError:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to("meta"), "that the file does not hold"),
        (lambda x: x.to(torch.complex64), "dtypes torch.complex64"),
        (lambda x: x.long(), "dtypes torch.int64"),
    ],
)
def test_tensors_of_another_kind_are_refused(tmp_path, change, message):
    lists = rows()
    lists["values"] = [change(lists["values"][0])]
    with pytest.raises(CacheCorruptError, match=message):
        list(Megatron(*shard(tmp_path / "a", saved(**lists))))


def test_values_that_want_a_gradient_are_values(tmp_path):
    lists = rows()
    lists["values"][0].requires_grad_()
    (record,) = Megatron(*shard(tmp_path / "a", saved(**lists)))
    assert record.log_probs.tolist() == [-1.0] * 6


def test_a_place_of_tokens_is_whole(tmp_path):
    folder, tokens = shard(tmp_path / "a", saved(**rows()))
    tokens.write_text(tokens.read_text().replace('"iteration": 1', '"iteration": 1.5'))
    with pytest.raises(CacheError, match="line 1 is not a sample's tokens"):
        Megatron(folder, tokens)
