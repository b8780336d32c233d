# ruff: noqa: E402  (what needs the extra is imported after the check that it is there)
"""``kdfast cache capture``: what it reads documents from, what it says of files that hold none, and its last line."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")
arrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

import kdfast.cache
from kdfast.cache import CacheError, windows
from kdfast.cli.app import app
from kdfast.cli.documents import documents

TEXTS = ["a b c", "b\nc", "é c"]
CHAT = [{"role": "user", "content": "a b"}]


def invoke(*arguments):
    result = testing.CliRunner().invoke(app, ["cache", *map(str, arguments)])
    return result, " ".join(result.output.replace("│", " ").split())


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_documents_are_read_from_files_of_every_kind(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    contents = {
        "a.jsonl": jsonl(rows[0]) + b"\n  \n" + jsonl(*rows[1:]) + b"\n",
        "b.jsonl.gz": gzip.compress(jsonl(*rows)),
        "c.jsonl": jsonl({"messages": CHAT}, {"input_ids": [1, 2]}),
    }
    want = {"a.jsonl": TEXTS, "b.jsonl.gz": TEXTS, "c.jsonl": [CHAT, [1, 2]], "d.parquet": TEXTS, "e.txt": [TEXTS[1]],
            "f.txt.gz": [TEXTS[2]]}  # fmt: skip
    contents["e.txt"], contents["f.txt.gz"] = TEXTS[1].encode(), gzip.compress(TEXTS[2].encode())
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(arrow.table({"text": TEXTS, "more": [1, 2, 3]}), tmp_path / "d.parquet")
    for name, expected in want.items():
        assert list(documents([tmp_path / name], None)) == expected, name
    assert list(documents([tmp_path / "a.jsonl", tmp_path / "e.txt"], "text")) == [*TEXTS, TEXTS[1]]


@pytest.mark.parametrize(
    ("name", "data", "field", "message"),
    [
        ("a.jsonl", jsonl({"text": "a"}) + b"{oops\n", None, r"a.jsonl, line 2: is no JSON"),
        ("a.jsonl", jsonl({"text": None}), "text", r"a.jsonl, line 1: 'text' is null"),
        ("a.jsonl", jsonl({"text": "a"}, {"text": None}), None, r"a.jsonl, line 2: there is none of text, messages"),
        ("a.jsonl", jsonl({"body": "a"}), None, r"line 1: there is none of text, messages, input_ids, only body"),
        ("a.jsonl", jsonl({"body": "a"}), "text", r"line 1: there is no 'text', only body"),
        ("a.jsonl", jsonl({"text": 5}), None, r"line 1: must be a text, messages or ids, got 5"),
        ("a.jsonl", b'"a"\n', None, r"line 1: must be an object with the field 'text', got str"),
        ("a.jsonl", b"null\n", None, r"line 1: must be an object with the field 'text', got NoneType"),
        ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), None, r"a.jsonl, after line 0: is no UTF-8"),
        ("a.txt", "é".encode("latin-1"), None, r"a.txt: is no UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"text")[:-4], None, r"a.txt.gz: is no whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}")[:10] + b"\xff" * 9,
            None,
            r"a.jsonl.gz, after line 0: is no whole gzip file",
        ),
        ("a.jsonl", b"[" * 100_000, None, r"a.jsonl, line 1: is no JSON"),
        ("a.jsonl", b'{"input_ids": [1' + b"0" * 5000 + b"]}", None, r"a.jsonl, line 1: is no JSON"),
        ("a.parquet", b"nothing", None, r"a.parquet: is no Parquet file"),
    ],
)
def test_what_is_no_document_is_named_with_file_and_line(tmp_path, name, data, field, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CacheError, match=message):
        list(documents([tmp_path / name], field))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "<unk>", "a", "b", "c"])}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_the_last_line_counts_what_came_of_the_records(tmp_path, model):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a b c"}, {"text": "a b c"}, {"text": "c b"}))
    arguments = ["capture", model, tmp_path / "a.jsonl", "--out", tmp_path / "cache", "--max-length", 3]
    arguments += ["--stride", 1, "--bos"]
    result, output = invoke(*arguments)
    assert result.exit_code == 0, output
    assert "process 0 of 1: 3 records, 9 rows added; 0 records were stored already; 2 came again" in output
    cache = kdfast.cache.open(tmp_path / "cache")
    assert all(ids in cache for ids in windows(None, [[0, 2, 3], [0, 3, 4], [0, 4, 3]], 3))
    assert "0 records, 0 rows added; 3 records were stored already; 2 came again" in invoke(*arguments)[1]


@pytest.mark.parametrize(("given", "chosen"), [(["far"], "prototype"), (["1.5"], "prototype"), (["0.2"], "sample")])
def test_the_last_line_has_the_floor_that_the_student_s_distance_allows(tmp_path, model, monkeypatch, given, chosen):
    monkeypatch.setattr("kdfast.cache.codecs.auto.SMALL_VOCAB", 4)
    (tmp_path / "a.txt").write_text("a b c b a c")
    arguments = ["capture", model, tmp_path / "a.txt", "--out", tmp_path / "cache"]
    result, output = invoke(*arguments, "--student-kl", *given)
    assert result.exit_code == 0, output
    info = kdfast.cache.open(tmp_path / "cache").info
    assert info.codec == chosen
    told = "none, the labels are unbiased, with the noise of 23 draws a row" if info.noise else info.floor.text()
    assert f"; floor: {told}" in output


def test_options_that_do_not_fit_are_named(tmp_path, model):
    (tmp_path / "a.txt").write_text("a b c")
    arguments = ["capture", model, tmp_path / "a.txt", "--out", tmp_path / "cache"]
    result, output = invoke(*arguments, "--dtype", "float8")
    assert result.exit_code == 2
    assert "'float8' is none of auto, float32, bfloat16, float16" in output
    result, output = invoke(*arguments, "--codec", "topk", "--option", "k=abc")
    assert result.exit_code == 1
    assert "codec 'topk': 'str' object cannot be interpreted as an integer; it was given k='abc'" in output
    result, output = invoke(*arguments, "--student-kl", "near")
    assert result.exit_code == 1
    assert "student_kl must be KL(teacher || student) in nats, or \"far\" (1 nat and more), got 'near'" in output
    result, output = invoke(*arguments, "--option", "k")
    assert result.exit_code == 2
    assert "an option is NAME=VALUE" in output


def test_an_export_to_another_format_is_refused(tmp_path):
    with kdfast.cache.Writer(tmp_path / "cache", vocab_size=4, codec="topk", k=2) as writer:
        writer.add("a", torch.randn(2, 4))
    result, output = invoke("export", tmp_path / "cache", tmp_path / "x.csv")
    assert result.exit_code == 1
    assert "would be a Parquet file: give it a name that ends in .parquet" in output
    assert not (tmp_path / "x.csv").exists()
