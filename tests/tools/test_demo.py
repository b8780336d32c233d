# ruff: noqa: E402  (what needs the extra is imported after the check that it is there)
"""``kdfast demo``, end to end, in its quick setting."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
testing = pytest.importorskip("typer.testing")

import kdfast.cache
from kdfast.cli.app import app
from kdfast.demo import data, models
from kdfast.demo.arms import arms, objective
from kdfast.demo.labels import read, write
from kdfast.demo.report import summary
from kdfast.demo.settings import Settings
from kdfast.demo.train import fit

ARMS = ["no_kd", "smoothing", "kd_own", "kd_labelled", "kd_all", "all_labels"]
METRICS = ["accuracy", "precision", "recall", "f1", "auc"]
PNG = b"\x89PNG\r\n\x1a\n"


def run(out):
    result = testing.CliRunner().invoke(app, ["demo", "--quick", "--seeds", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return SimpleNamespace(out=out, text=result.output, numbers=json.loads((out / "results.json").read_text()))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def digits():
    return data.load()


class TestReport:
    def test_terminal_has_every_arm_and_the_caveats(self, quick):
        for arm in arms(Settings()):
            assert arm.title in quick.text
        prose = " ".join(quick.text.split())
        assert "trained on all 1200 training labels" in prose
        assert "are the controls" in prose
        assert "…" not in quick.text  # nothing is cut off at 80 columns

    def test_json_has_every_model_and_metric(self, quick):
        models_ = quick.numbers["models"]
        assert list(models_) == ["teacher", "own_teacher", *ARMS]
        for name, model in models_.items():
            for metric in METRICS:
                found = model["metrics"][metric]
                assert len(found["values"]) == (1 if name == "teacher" else 2)
                assert all(0 <= value <= 1 for value in found["values"])
                assert math.isclose(found["mean"], sum(found["values"]) / len(found["values"]))
            assert model["parameters"] > 1000
            assert model["train_samples_per_second"] > 0

    def test_json_says_how_to_get_it_again(self, quick):
        assert {"python", "kdfast", "torch", "scikit-learn"} <= set(quick.numbers["versions"])
        assert quick.numbers["seeds"] == [0, 1]
        assert quick.numbers["settings"]["labelled"] == 60
        assert quick.numbers["images"] == {"train": 1200, "test": 597}
        assert all(rate > 0 for rate in (quick.numbers["throughput"][s] for s in ("none", "memory", "cache", "live")))

    def test_figure(self, quick):
        figure = (quick.out / "curves.png").read_bytes()
        assert figure.startswith(PNG)
        assert len(figure) > 20_000

    def test_distillation_learns(self, quick):
        for arm in ("kd_labelled", "kd_all"):
            assert quick.numbers["models"][arm]["metrics"]["accuracy"]["mean"] > 0.4  # chance is 0.1

    def test_differences_are_paired(self, quick):
        ours, base = (quick.numbers["models"][arm]["metrics"]["accuracy"]["values"] for arm in ("kd_all", "no_kd"))
        expected = summary([a - b for a, b in zip(ours, base, strict=True)])
        assert quick.numbers["models"]["kd_all"]["accuracy_minus_no_kd"] == expected
        assert quick.numbers["models"]["no_kd"]["accuracy_minus_no_kd"] == {"mean": 0.0, "std": 0.0}


class TestCache:
    def test_opens_and_verifies(self, quick):
        cache = kdfast.cache.open(quick.out / quick.numbers["cache"]["path"])
        cache.verify()
        assert (len(cache), cache.info.codec, cache.info.vocab_size) == (1200, "dense", 10)
        assert quick.numbers["cache"]["bytes_per_sample"]["payload"] == cache.nbytes / 1200 < 40

    def test_second_run_gives_the_same_and_keeps_the_cache(self, quick):
        shard = next((quick.out / quick.numbers["cache"]["path"]).glob("shard-*"))
        before, written = quick.numbers, shard.stat().st_mtime_ns
        after = run(quick.out).numbers
        assert shard.stat().st_mtime_ns == written
        for name, model in before["models"].items():
            assert after["models"][name]["metrics"] == model["metrics"]

    def test_labels_are_the_teachers(self, digits, tmp_path):
        train, _ = digits
        teacher = models.build(models.teacher, 1, "cpu")
        labels = read(write(teacher, train, tmp_path), train)
        exact = models.logits_of(teacher, train.images).log_softmax(1)
        torch.testing.assert_close(labels.values, exact, atol=0.01, rtol=0)

    def test_corruption_is_reported(self, digits, tmp_path):
        train, _ = digits
        path = write(models.build(models.teacher, 1, "cpu"), train, tmp_path)
        shard = next(path.glob("shard-*"))
        content = bytearray(shard.read_bytes())
        content[-1000] ^= 1
        shard.write_bytes(content)
        with pytest.raises(kdfast.cache.CacheCorruptError, match=shard.name):
            write(models.build(models.teacher, 1, "cpu"), train, tmp_path)


class TestFairness:
    def test_splits_do_not_overlap(self, digits):
        train, test = digits
        inner, validation = data.load(validation=True)
        rows = [{bytes(image.numpy()) for image in split.pixels} for split in (train, test, inner, validation)]
        assert not rows[0] & rows[1]
        assert not rows[2] & rows[3]
        assert rows[2] | rows[3] == rows[0]

    def test_labelled_images_are_balanced_and_seeded(self, digits):
        labels = digits[0].labels
        rows = data.pick_labelled(labels, 60, 3)
        assert labels[rows].bincount().tolist() == [6] * 10
        assert rows.equal(data.pick_labelled(labels, 60, 3))
        assert not rows.equal(data.pick_labelled(labels, 60, 4))
        with pytest.raises(ValueError, match="multiple of 10"):
            data.pick_labelled(labels, 55, 0)

    def test_soft_only_arm_reads_no_label(self, digits):
        train, test = digits
        settings = Settings().quick()
        soft = {"main": kdfast.SoftLabels.dense(torch.zeros(len(train), 10))}
        arm = next(arm for arm in arms(settings) if arm.name == "kd_all")
        loss = objective(arm, torch.full_like(train.labels, -1), soft, settings.temperature)
        model = models.build(models.student, 0, "cpu")
        fit(model, train, torch.arange(len(train)), loss, settings.student, 0, test=test)
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_building_a_model_leaves_the_global_generator(self):
        state = torch.get_rng_state()
        first, second = (models.build(models.student, 7, "cpu") for _ in range(2))
        assert torch.get_rng_state().equal(state)
        assert models.fingerprint(first) == models.fingerprint(second)
        assert models.fingerprint(first) != models.fingerprint(models.build(models.student, 8, "cpu"))
