"""How experiments are run: what an arm is given, tuning, resuming after a kill, and the same numbers in any process."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from kdfast.demo.settings import Schedule
from kdfast.experiments.arms import Arm, grid
from kdfast.experiments.catalogue import EXPERIMENTS, Experiment
from kdfast.experiments.runner import complete, file_of, planned
from kdfast.experiments.settings import Settings
from kdfast.experiments.store import FINAL, TUNING, ResultsError, Run, Store, read_runs
from kdfast.experiments.tasks import domain_shift, few_labels_digits, label_noise
from kdfast.experiments.training import Batches, PrecomputedTeacher, WithFeatures
from support import ROOT

SHORT = Schedule(epochs=2, learning_rate=1e-2, weight_decay=1e-2, steps_per_epoch=2, batch=20)
TINY = Settings(seeds=2, candidates=2, tuning_seeds=1, student=SHORT, teacher=SHORT, source_teacher=SHORT)


def row(arm="no_kd", seed=0, **changes):
    return replace(Run(arm, FINAL, seed, {"a": 1}, "print", {"clean": 0.5}, {"seconds": 1.0}), **changes)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters())


@pytest.fixture
def counted():
    """An experiment whose arms count their trainings: ``good`` is best with ``a=2``."""
    calls = []

    class Fixed(nn.Module):
        def __init__(self, share):
            super().__init__()
            self.share = share

        def forward(self, images):
            right = torch.arange(len(images)) < self.share * len(images)
            return nn.functional.one_hot((~right).long(), 2).float()

    def train(task, a):
        calls.append((task.seed, a))
        return Fixed({1: 0.5, 2: 0.9}[a])

    def task(seed, settings, *, validation):
        made = few_labels_digits(seed, settings, validation=validation)
        return replace(made, tests={"clean": (torch.zeros(10, 64), torch.zeros(10, dtype=torch.int64))})

    arm = Arm("good", "good", train, grid(a=[1, 2]))
    return Experiment("counted", "Counted", task, (arm,), ("good",), ()), calls


class TestStore:
    def test_keeps_what_was_appended(self, tmp_path):
        runs = [row(seed=seed) for seed in range(3)]
        with Store(tmp_path / "new" / "x.jsonl") as store:
            for run in runs:
                store.append(run)
        assert read_runs(tmp_path / "new" / "x.jsonl") == runs
        with Store(tmp_path / "new" / "x.jsonl") as store:
            assert set(store.runs) == {run.key for run in runs}

    def test_a_torn_line_is_dropped_and_nothing_else(self, tmp_path):
        path = tmp_path / "x.jsonl"
        with Store(path) as store:
            store.append(row(seed=0))
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:40])
        assert read_runs(path) == [row(seed=0)]
        with Store(path) as store:
            store.append(row(seed=1))
        assert read_runs(path) == [row(seed=0), row(seed=1)]

    def test_another_file_is_named_and_left_alone(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text("{}\nno json\n")
        with pytest.raises(ResultsError, match=r"x\.jsonl, line 1 is not a run"):
            Store(path)
        assert path.read_text() == "{}\nno json\n"

    def test_one_writer_at_a_time(self, tmp_path):
        with Store(tmp_path / "x.jsonl"), pytest.raises(ResultsError, match="being written by another process"):
            Store(tmp_path / "x.jsonl")
        Store(tmp_path / "x.jsonl").__exit__(None, None, None)

    def test_keys_tell_runs_apart(self):
        others = [row(arm="kd"), row(seed=1), row(stage=TUNING), row(options={"a": 2}), row(settings="other")]
        assert len({run.key for run in [row(), *others]}) == 6
        assert row().key == row(scores={}, about={}).key


class TestComplete:
    def test_tunes_first_and_continues_with_the_best(self, counted, tmp_path):
        experiment, calls = counted
        ticks = []
        runs = complete(experiment, TINY, tmp_path, advance=lambda: ticks.append(1))
        assert calls == [(1000, 1), (1000, 2), (0, 2), (1, 2)]
        assert [(run.seed, run.options, run.scores) for run in runs] == [
            (seed, {"a": 2}, {"clean": pytest.approx(0.9)}) for seed in (0, 1)
        ]
        assert len(ticks) == planned(experiment, TINY) == 4

    def test_without_tuning_takes_the_first_candidate(self, counted, tmp_path):
        experiment, calls = counted
        complete(experiment, replace(TINY, candidates=1), tmp_path)
        complete(replace(experiment, tuned=False), TINY, tmp_path)
        assert calls == [(0, 1), (1, 1)]  # the second call found both

    def test_makes_only_what_is_missing(self, counted, tmp_path):
        experiment, calls = counted
        complete(experiment, TINY, tmp_path)
        path = file_of(tmp_path, "counted")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        calls.clear()
        ticks = []
        complete(experiment, replace(TINY, seeds=3), tmp_path, advance=lambda: ticks.append(1))
        assert calls == [(1, 2), (2, 2)]
        assert len(ticks) == 5

    def test_other_settings_are_other_runs(self, counted, tmp_path):
        experiment, calls = counted
        complete(experiment, TINY, tmp_path)
        calls.clear()
        complete(experiment, replace(TINY, student=replace(SHORT, epochs=3)), tmp_path)
        assert len(calls) == 4

    def test_lines_say_how_to_get_them_again(self, counted, tmp_path):
        complete(counted[0], TINY, tmp_path)
        for line in file_of(tmp_path, "counted").read_text().splitlines():
            found = json.loads(line)
            assert {"seconds", "date", "commit", "torch", "python", "processor", "cores"} <= set(found["about"])
            assert found["settings"] == TINY.fingerprint

    def test_processes_change_no_number(self, tmp_path):
        experiment = EXPERIMENTS["few-labels-digits"]
        few = replace(experiment, arms=tuple(arm for arm in experiment.arms if arm.name in ("kd", "mutual")))
        settings = replace(TINY, candidates=1)
        alone = complete(few, settings, tmp_path / "alone")
        shared = complete(few, settings, tmp_path / "shared", jobs=2)
        assert [run.scores for run in alone] == [run.scores for run in shared]
        assert len({str(run.scores) for run in alone}) > 1

    def test_resumes_after_a_kill(self, tmp_path):
        main = [sys.executable, "-c", "from kdfast.cli import main; main()"]
        command = [*main, "experiments", "run", "label-noise", "--quick", "--out", str(tmp_path)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = file_of(tmp_path, "label-noise")
        while child.poll() is None and len(read_runs(path)) < 2:
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
        before = read_runs(path)
        assert 2 <= len(before) < len(EXPERIMENTS["label-noise"].arms)
        experiment = EXPERIMENTS["label-noise"]
        arms = experiment.arms[: len(before) + 1]
        runs = complete(replace(experiment, arms=arms), Settings(seeds=1).quick(), tmp_path)
        assert runs[: len(before)] == before
        assert len(read_runs(path)) == len(before) + 1


class TestPublished:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_results_in_the_repository_are_resumed_with_nothing_to_run(self, name, tmp_path):
        def refuse(task, **options):
            raise AssertionError(f"no run of the file is {options}")

        shutil.copy(file_of(ROOT / "benchmarks" / "results", name), tmp_path)
        experiment = EXPERIMENTS[name]
        arms = tuple(replace(arm, train=refuse) for arm in experiment.arms)
        ticks = []
        runs = complete(replace(experiment, arms=arms), Settings(), tmp_path, advance=lambda: ticks.append(1))
        assert len(runs) == len(arms) * Settings().seeds
        assert len(ticks) == planned(experiment, Settings())


class TestFairness:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_arms_have_equal_budgets_and_names_of_their_own(self, name):
        experiment = EXPERIMENTS[name]
        if experiment.tuned:
            assert {len(arm.candidates) for arm in experiment.arms if not arm.bound} == {Settings().candidates}
        assert len({arm.name for arm in experiment.arms}) == len({arm.title for arm in experiment.arms})
        assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)
        assert set(experiment.references) <= {arm.name for arm in experiment.arms if not arm.bound}

    def test_tuning_never_sees_the_test_split(self):
        final = few_labels_digits(0, TINY, validation=False)
        tuning = few_labels_digits(0, TINY, validation=True)
        tested = {bytes(image.numpy()) for image in final.tests["clean"][0]}
        for images in (tuning.inputs, tuning.taught[0], tuning.tests["clean"][0]):
            assert not tested & {bytes(image.numpy()) for image in images}

    @pytest.mark.parametrize("arm", EXPERIMENTS["domain-shift"].arms, ids=lambda arm: arm.name)
    def test_no_target_label_reaches_an_arm_but_the_bound(self, arm):
        task = domain_shift(0, TINY, validation=False)
        images, labels = task.everything
        wrong = replace(task, everything=(images, 9 - labels), tests={})
        ours, theirs = (weights(arm.train(one, **arm.candidates[0])) for one in (task, wrong))
        assert ours.equal(theirs) == (arm.name != "all_labels")

    def test_the_domain_shift_cannot_be_tuned(self):
        assert not EXPERIMENTS["domain-shift"].tuned
        with pytest.raises(ValueError, match="no validation split"):
            domain_shift(0, TINY, validation=True)

    def test_own_teacher_knows_the_students_labels_only(self):
        task = few_labels_digits(0, TINY, validation=False)
        other = replace(task, taught=(task.taught[0], 9 - task.taught[1]))
        assert weights(task.own_teacher).equal(weights(other.own_teacher))
        assert not weights(task.teacher).equal(weights(other.teacher))

    def test_noisy_labels_are_the_teachers_too(self):
        task = label_noise(0, TINY, validation=False)
        assert task.taught is task.labelled
        assert (task.labelled[1] != task.everything[1]).float().mean() == pytest.approx(0.3)


class TestTraining:
    def test_batches_are_passes_over_all_rows(self):
        rows = torch.arange(50)
        batches = Batches((rows, -rows), replace(SHORT, steps_per_epoch=3), seed=1)
        seen = [batch for _ in range(2) for batch in batches]  # 20, 20, 10; 20, 20, 10
        assert len(batches) == 3
        assert [len(batch[0]) for batch in seen] == [20, 20, 10] * 2
        first, second = (torch.cat([batch[0] for batch in part]) for part in (seen[:3], seen[3:]))
        assert first.sort().values.equal(rows)
        assert second.sort().values.equal(rows)
        assert not first.equal(second)
        assert all(left.equal(-right) for left, right in seen)

    def test_precomputed_outputs_are_the_models(self):
        model = nn.Sequential(nn.Linear(64, 4), nn.Dropout(0.5), nn.Linear(4, 3))
        images = torch.rand(30, 64)
        for module in (model, WithFeatures(model)):
            teacher = PrecomputedTeacher(module, images)
            rows = torch.randperm(30)[:7]
            with torch.no_grad():
                expected = module.eval()(images[rows])
            module.train()
            torch.testing.assert_close(teacher(images[rows]), expected)
        with pytest.raises(KeyError):
            teacher(torch.rand(1, 64))

    def test_features_are_what_the_last_layer_is_given(self):
        model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
        images = torch.rand(5, 64)
        found = WithFeatures(model)(images)
        assert found["features"].equal(model[:2](images))
        assert found["logits"].equal(model(images))
