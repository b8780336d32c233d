"""A run that is killed resumes to the same weights, bit by bit."""

import multiprocessing
import os
import shutil
import signal
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

from kdfast import Distiller
from kdfast.recipes import Bootstrap
from support.distill_runs import BATCHES, EPOCHS, LOADERS, Projected, die_at, run
from support.distillers import CLASSES, FEATURES, data, loader, quick, states_equal, student, teacher

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint-v1"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["support.distill_runs", "torchmetrics"])


def kill(folder, kind, batch, every):
    process = SERVER.Process(target=die_at, args=(folder, kind, batch, every))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def measured(history):
    return [[record[name] for name in ("epoch", "step", "loss", "lr", "accuracy")] for record in history]


# Killed within the second epoch, after a checkpoint in it, at one of an epoch's end, and before there is any.
@pytest.mark.parametrize(
    ("kind", "batch", "every"),
    [(kind, 11, 2) for kind in LOADERS] + [("default", 8, None), ("default", 2, 3), ("elastic", 13, 3)],
)
def test_it_resumes_bit_by_bit(tmp_path, kind, batch, every):
    expected, objective, history = run(tmp_path / "whole", kind)
    kill(tmp_path / "killed", kind, batch, every)
    assert (tmp_path / "killed" / "last.pt").exists() == ((batch, every) != (2, 3))
    calls = []
    model, again, resumed = run(tmp_path / "killed", kind, calls.append, checkpoint_every=every)
    assert len(calls) < EPOCHS * BATCHES or batch == 2
    states_equal(model.state_dict(), expected.state_dict())
    states_equal(again.state_dict(), objective.state_dict())
    assert measured(resumed) == measured(history)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert len(logs[0]) == len(logs[1])


def test_early_stopping_resumes_too(tmp_path):
    """The best student is of the first epoch, and was measured by the process that is gone."""

    def fit(folder, epochs):
        model = student()
        values = {1: 0.9, 2: 0.5, 3: 0.4}
        distiller = Distiller(model, teacher(), folder=folder)
        count = lambda d, _: {"accuracy": values[d.epoch + 1]}  # noqa: E731
        options = {"eval_loader": loader(), "metrics": count, "patience": 2, "progress": False}
        return model, distiller.fit(loader(), epochs=epochs, **options)

    torch.manual_seed(0)
    whole, _ = fit(tmp_path / "a", 9)
    torch.manual_seed(0)
    fit(tmp_path / "b", 2)
    again, history = fit(tmp_path / "b", 9)
    assert len(history) == 3
    states_equal(whole.state_dict(), again.state_dict())


def test_resume_false_starts_over(tmp_path):
    run(tmp_path, "default")
    calls = []
    run(tmp_path, "default", calls.append, resume=False)
    assert len(calls) == EPOCHS * BATCHES
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == EPOCHS * (BATCHES + 1)


@pytest.mark.parametrize("folder", ["run", "~/run"])
def test_a_folder_stays_where_it_was_when_it_was_given(tmp_path, monkeypatch, folder):
    quick(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    alone, turns = Distiller(student(), folder=folder), Bootstrap(teacher(), student(), folder=folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    alone.fit(loader(), epochs=1, progress=False)
    turns.fit(loader(), rounds=1, epochs=1, progress=False)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"last.pt", "plan.json", "student", "teacher"}


def test_a_cut_line_of_the_log_is_written_again(tmp_path):
    kill(tmp_path, "default", 11, 2)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 99, "ep')
    run(tmp_path, "default")
    assert [line.count("step") for line in log.read_text().splitlines()] == [1] * len(log.read_text().splitlines())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Distiller(student(), teacher(), folder=tmp_path).fit(loader(), epochs=1, progress=False)

    def resume(message, model, **options):
        with pytest.raises(ValueError, match=message):
            Distiller(model, teacher(), folder=tmp_path, **options).fit(loader(), epochs=2, progress=False)

    resume(r"(?s)last.pt is of another student.*resume=False", nn.Linear(FEATURES, CLASSES))
    resume(r"last.pt is of another optimizer", student(), freeze=["0.*"])
    resume(r"holds .*this run has .*objective", student(), objective=Projected())
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    resume(r"last.pt is not a checkpoint", student())
    torch.save({"version": 99}, tmp_path / "last.pt")
    resume(r"not a checkpoint of version 1", student())


def test_a_loader_that_is_another_is_refused(tmp_path):
    kill(tmp_path, "default", 11, 2)
    with pytest.raises(ValueError, match="one has a state_dict"):
        run(tmp_path, "elastic")


class Interrupted(list):
    """Six batches, of which the last one never comes."""

    def __iter__(self):
        yield from islice(super().__iter__(), 5)
        raise KeyboardInterrupt


def test_a_loader_of_fewer_batches_is_refused(tmp_path):
    batches = Interrupted(data(8, seed) for seed in range(6))
    with pytest.raises(KeyboardInterrupt):
        Distiller(student(), folder=tmp_path).fit(batches, epochs=1, checkpoint_every=1, progress=False)
    with pytest.raises(ValueError, match="has 3 batches, and 5 were trained on"):
        Distiller(student(), folder=tmp_path).fit(batches[:3], epochs=1, progress=False)


def test_an_unknown_number_of_batches_that_has_shrunk_is_refused(tmp_path):
    class Stream:
        def __init__(self, path):
            self.path = path

        def __iter__(self):
            for seed in range(6):
                if (self.path / "last.pt").exists() and seed == 5 - 2 * (self.path / "less").exists():
                    return
                yield data(8, seed)
                if seed == 4:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distiller(student(), folder=tmp_path).fit(Stream(tmp_path), epochs=1, checkpoint_every=1, progress=False)
    (tmp_path / "less").touch()
    with pytest.raises(ValueError, match="has 3 batches, and 5 were trained on"):
        Distiller(student(), folder=tmp_path).fit(Stream(tmp_path), epochs=1, progress=False)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    run(tmp_path, "default")
    before = (tmp_path / "last.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "default", resume=False)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_persistent_workers_are_refused_where_a_run_must_resume(tmp_path):
    batches = loader(num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers=False, or a sampler with a state_dict"):
        Distiller(student(), folder=tmp_path).fit(batches, epochs=1, progress=False)


def test_a_checkpoint_of_an_older_layout_resumes(tmp_path):
    """It is of step 8, the second of epoch 2, and calls the counters "tally"."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    held = torch.load(OLD / "last.pt", weights_only=True)
    model, calls = student(7), []
    model.register_forward_pre_hook(lambda *_: calls.append(model[0].weight.clone()) if model.training else None)
    distiller = Distiller(model, teacher(), schedule="cosine", lr=0.01, folder=tmp_path)
    options = {"eval_loader": [data(16)], "metrics": ["accuracy"], "patience": 2, "progress": False}
    with pytest.warns(UserWarning, match=r"last.pt does not say which run it is of.*options, teacher and data"):
        history = distiller.fit([data(8, seed) for seed in range(6)], epochs=2, **options)
    assert len(calls) == 4
    assert torch.equal(calls[0], held["student"]["0.weight"])
    assert history[:1] == held["tally"]["history"]
    assert [record["step"] for record in history] == [6, 12]
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert "tally" not in saved
    assert saved["train_state"]["epoch"] == 2


# ---- skipping what was trained on -----------------------------------------------------------------------------------


class Read(Dataset):
    """A dataset that counts what it decodes, with augmentation or without."""

    def __init__(self, augment=False):
        (self.x, self.y), self.augment, self.read = data(40), augment, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read.append(i)
        return self.x[i] + (0.1 * torch.randn(FEATURES) if self.augment else 0.0), self.y[i]


class Drawing(Sampler):
    """A sampler that draws from the global generator between its items."""

    def __len__(self):
        return 40

    def __iter__(self):
        for _ in range(40):
            yield int(torch.randint(40, ()))


SAMPLERS = {
    "shuffled": lambda dataset, **options: DataLoader(dataset, 5, shuffle=True, **options),
    "in order": lambda dataset, **options: DataLoader(dataset, 5, **options),
    "own generator": lambda dataset, **options: DataLoader(
        dataset, 5, shuffle=True, generator=torch.Generator().manual_seed(3), **options
    ),
    "replacement": lambda dataset, **options: DataLoader(
        dataset, 5, sampler=RandomSampler(dataset, replacement=True, num_samples=40), **options
    ),
    "weighted": lambda dataset, **options: DataLoader(
        dataset, 5, sampler=WeightedRandomSampler(torch.arange(1.0, 41), 40), **options
    ),
    "one by one": lambda dataset, **options: DataLoader(dataset, None, shuffle=True, **options),
    "drawing": lambda dataset, **options: DataLoader(dataset, 5, sampler=Drawing(), **options),
    "workers": lambda dataset, **options: DataLoader(dataset, 5, shuffle=True, num_workers=1, **options),
}
STOP = 5


class Stop(Exception):
    pass


def stopped_and_resumed(tmp_path, make, augment):
    """Batches of a run that is stopped after some, and of its second part; what the second part has read."""

    def fit(folder, dataset, stop):
        torch.manual_seed(5)
        model, seen = nn.Linear(FEATURES, CLASSES), []

        def look(module, arguments):
            if len(seen) == stop:
                raise Stop
            seen.append(arguments[0].clone())

        model.register_forward_pre_hook(look)
        with suppress(Stop):
            Distiller(model, folder=folder).fit(make(dataset), epochs=1, checkpoint_every=1, progress=False)
        return seen

    whole = fit(tmp_path / "whole", Read(augment), None)
    fit(tmp_path / "part", Read(augment), STOP)
    dataset = Read(augment)
    rest = fit(tmp_path / "part", dataset, None)
    return whole, rest, dataset.read


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_skipped_samples_are_not_decoded_and_the_order_stays(tmp_path, monkeypatch, kind, augment):
    quick(monkeypatch)
    whole, rest, read = stopped_and_resumed(tmp_path, SAMPLERS[kind], augment)
    assert len(rest) == len(whole) - STOP
    assert all(torch.equal(a, b) for a, b in zip(whole[STOP:], rest, strict=True))
    if kind != "workers":
        trained_on = STOP * (1 if kind == "one by one" else 5)
        # A sampler that draws between its items has an order that depends on what the samples draw.
        assert len(read) == 40 - (0 if kind == "drawing" else trained_on)


def test_batches_of_another_size_are_refused(tmp_path):
    class Stream:
        def __iter__(self):
            for part in zip(*(x.split(len(sizes) and sizes[-1]) for x in data(40)), strict=True):
                if calls and len(calls) == 4:
                    raise KeyboardInterrupt
                calls.append(part)
                yield part

    sizes, calls = [8], []
    with pytest.raises(KeyboardInterrupt):
        Distiller(student(), folder=tmp_path).fit(Stream(), epochs=1, checkpoint_every=1, progress=False)
    sizes, calls = [4], []
    with pytest.raises(ValueError, match="first 4 batches have 16 samples, and 32 were trained on"):
        Distiller(student(), folder=tmp_path).fit(Stream(), epochs=1, progress=False)
