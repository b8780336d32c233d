"""Imports of files that claim what they do not hold: named errors, before room is made for it."""

import io
import json
import os
import tarfile
import zipfile

import pytest
import torch

from kdfast.cache import CacheCorruptError, CacheError
from kdfast.cache.convert import DistillKit, ExpansionError, Megatron, TopKLogProbs
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
