# ruff: noqa: E402  (what needs the extra is imported after the check that it is there)
"""``kdfast cache merge | convert | export | stats``: what they print, and how they end."""

import json
import math

import pytest
import torch

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")
pq = pytest.importorskip("pyarrow.parquet")

import kdfast.cache
from kdfast.cli.app import app
from support import ROOT

VOCAB = 10


def invoke(*arguments):
    return testing.CliRunner().invoke(app, ["cache", *map(str, arguments)])


def output_of(result):
    """The output as one line: tables and error texts wrap."""
    return " ".join(result.output.split())


def fill(path, names="abc", **options):
    given = {"vocab_size": VOCAB, "codec": "topk", "k": 4, "teacher": "t", **options}
    with kdfast.cache.Writer(path, **{name: value for name, value in given.items() if value is not None}) as writer:
        for i, name in enumerate(names):
            writer.add(name, torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(i)))
    return path


@pytest.fixture
def samples(tmp_path):
    """A file of one sample of two rows, the second of which has no log-probability in its last entry."""
    rows = [{"1": math.log(0.5), "2": math.log(0.25)}, {"2": math.log(0.5)}]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"input_ids": [0, 1, 2], "logprobs": [None, *rows]}))
    return path


@pytest.mark.parametrize("command", ["merge", "convert", "export", "stats"])
def test_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


class TestMerge:
    def test_merge(self, tmp_path):
        a, b = fill(tmp_path / "a"), fill(tmp_path / "b", "cd")
        result = invoke("merge", a, b, tmp_path / "all")
        assert result.exit_code == 0
        assert "2 shards copied" in output_of(result)
        assert "holds 4 records (1 duplicates besides)" in output_of(result)
        assert len(kdfast.cache.open(tmp_path / "all")) == 4
        assert "0 shards copied (0 bytes), 2 there already" in output_of(invoke("merge", a, b, tmp_path / "all"))

    def test_link(self, tmp_path):
        a = fill(tmp_path / "a")
        assert "1 shards linked" in output_of(invoke("merge", "--link", a, tmp_path / "all"))
        (shard,) = (tmp_path / "all").glob("shard-*")
        assert shard.stat().st_nlink == 2

    def test_mismatch(self, tmp_path):
        a, b = fill(tmp_path / "a"), fill(tmp_path / "b", teacher="u")
        result = invoke("merge", a, b, tmp_path / "all")
        assert result.exit_code == 1
        assert "teacher='u'" in output_of(result)
        assert "teacher='t'" in output_of(result)
        assert not (tmp_path / "all").exists()

    def test_one_folder(self, tmp_path):
        assert invoke("merge", tmp_path / "a").exit_code == 2

    def test_unfinished(self, tmp_path):
        a = fill(tmp_path / "a")
        (a / "shard-1-00000.safetensors.part").write_bytes(b"")
        assert "not merged" in output_of(invoke("merge", a, tmp_path / "all"))


class TestFloor:
    """How far the labels lie from the teacher's rows is told by info and stats, in one line."""

    @pytest.mark.parametrize("command", ["info", "stats"])
    def test_labels_that_have_one(self, tmp_path, command):
        path = fill(tmp_path / "a", codec="dense", k=None, bits=4)
        floor = kdfast.cache.open(path).info.floor
        line = f"floor {floor.kl:.2g} ± {floor.standard_error:.1g} nats, {100 * floor.share:.2g} % of the rows' entropy"
        assert line in output_of(invoke(command, path)).replace("│ ", "")

    @pytest.mark.parametrize("command", ["info", "stats"])
    def test_labels_that_are_drawn_and_labels_of_old_caches(self, tmp_path, command):
        drawn = output_of(invoke(command, fill(tmp_path / "a", codec="sample", k=None, draws=7)))
        assert "floor │ none: unbiased, with the noise of 7 draws a row" in drawn
        assert "floor │ not measured" in output_of(invoke(command, ROOT / "tests" / "fixtures" / "v1" / "topk"))


class TestStats:
    def test_stats(self, tmp_path):
        result = invoke("stats", fill(tmp_path / "a", temperatures=(1.0, 2.0)))
        assert result.exit_code == 0
        for expected in (
            "3 (0 duplicates",
            "4.00 (4 to 4)",
            "288 bytes, 24.00 per row",
            "tail mass at T = 2",
            "all files",
        ):
            assert expected in output_of(result).replace("│ ", "")

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        result = invoke("stats", fill(tmp_path / "a"), "--plot", tmp_path / "a.png")
        assert result.exit_code == 0
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_an_empty_record_alone(self, tmp_path):
        with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="topk") as writer:
            writer.add("nothing", torch.zeros(0, VOCAB))
        assert invoke("stats", tmp_path).exit_code == 0


class TestExport:
    def test_export(self, tmp_path):
        result = invoke("export", fill(tmp_path / "a"), tmp_path / "a.parquet")
        assert result.exit_code == 0
        assert "3 records written" in output_of(result)
        assert pq.read_table(tmp_path / "a.parquet").num_rows == 3

    def test_no_place(self, tmp_path):
        result = invoke("export", fill(tmp_path / "a"), tmp_path / "nowhere" / "a.parquet")
        assert result.exit_code == 1
        assert "nowhere" in output_of(result)


class TestConvert:
    def convert(self, *arguments):
        return invoke("convert", *arguments, "--from", "topk-logprobs", "--vocab-size", VOCAB)

    def test_convert(self, tmp_path, samples):
        result = self.convert(samples, tmp_path / "c", "--alignment", "position", "--teacher", "me")
        assert result.exit_code == 0
        for expected in (
            "1 records, 2 rows, 1.5 entries per row",
            "62.50%",
            "37.50%",
            "1.67 times",
            "0.00% of the rows",
        ):
            assert expected in output_of(result)
        cache = kdfast.cache.open(tmp_path / "c")
        assert (cache.info.teacher, cache.info.config["k"]) == ("me", 2)
        assert cache[torch.tensor([0, 1, 2])].tails[0].exp().tolist() == pytest.approx([0.25, 0.5])

    def test_options(self, tmp_path, samples):
        arguments = ("--alignment", "position", "--k", 1, "--option", "value_dtype=float16", "--option", "block_rows=1")
        assert self.convert(samples, tmp_path / "c", *arguments).exit_code == 0
        assert kdfast.cache.open(tmp_path / "c").info.config == {"k": 1, "value_dtype": "float16"}
        result = self.convert(samples, tmp_path / "d", "--alignment", "position", "--option", "nonsense")
        assert result.exit_code == 2
        result = self.convert(samples, tmp_path / "d", "--alignment", "position", "--option", "speed=3")
        assert result.exit_code == 1
        assert "speed" in output_of(result)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--from", "topk-logprobs", "--alignment", "position"), "--vocab-size is needed"),
            (("--from", "topk-logprobs", "--vocab-size", VOCAB), "alignment must be 'position'"),
            (("--from", "topk-logprobs", "--vocab-size", VOCAB, "--alignment", "next"), "is it alignment 'position'?"),
            (
                ("--from", "topk-logprobs", "--vocab-size", 2, "--alignment", "position"),
                "sample 1: row 0: id 2 is outside",
            ),
            (("--from", "megatron", "--vocab-size", VOCAB), "--tokens is needed"),
            (("--from", "distillkit", "--vocab-size", VOCAB), "compression_config.yaml: is not there"),
        ],
    )
    def test_what_is_missing_is_said(self, tmp_path, samples, arguments, message):
        result = invoke("convert", samples, tmp_path / "c", *arguments)
        assert result.exit_code == 1
        assert message in output_of(result)

    def test_drop_broken(self, tmp_path, samples):
        samples.write_text(
            samples.read_text() + "\n" + json.dumps({"input_ids": [1, 2], "logprobs": [None, {"1": 0.0, "2": -1.0}]})
        )
        result = self.convert(samples, tmp_path / "c", "--alignment", "position")
        assert result.exit_code == 1
        assert "sample 2: row 0: probabilities add up to 1.36788" in output_of(result)
        result = self.convert(samples, tmp_path / "d", "--alignment", "position", "--drop-broken")
        assert result.exit_code == 0
        assert "1 records were left out" in output_of(result)
        result = self.convert(samples, tmp_path / "e", "--alignment", "position", "--tolerance", 0.5)
        assert result.exit_code == 0
        assert len(kdfast.cache.open(tmp_path / "e")) == 2

    def test_from_kdfast(self, tmp_path):
        result = invoke("convert", fill(tmp_path / "a"), tmp_path / "b", "--from", "kdfast", "--k", 2)
        assert result.exit_code == 0
        assert "3 records, 12 rows, 2.0 entries per row" in output_of(result)
        info = kdfast.cache.open(tmp_path / "b").info
        assert (info.config["k"], info.teacher, info.records) == (2, "t", 3)
        result = invoke("convert", tmp_path / "a", tmp_path / "c", "--from", "kdfast", "--codec", "dense")
        assert result.exit_code == 1
        assert "a dense cache cannot be made from" in output_of(result)


@pytest.mark.parametrize("command", [("stats",), ("export", "out.parquet"), ("merge", "all"), ("convert", "b")])
def test_no_cache(command, tmp_path):
    name, *rest = command
    more = ["--from", "kdfast"] if name == "convert" else []
    (tmp_path / "empty").mkdir()
    result = invoke(name, tmp_path / "empty", *(tmp_path / part for part in rest), *more)
    assert result.exit_code == 1
    assert "holds no shard" in output_of(result)
    result = invoke(name, tmp_path / "absent", *(tmp_path / part for part in rest), *more)
    assert result.exit_code == 1
    assert "absent" in output_of(result)
