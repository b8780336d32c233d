"""Several processes end with the parameters that one process of the whole batches has."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kdfast.cache
from kdfast import Distiller
from support import processes
from support.distillers import CLASSES, FEATURES, data

ROWS, BATCH = 24, 8


class Projected(nn.Module):
    """An objective with a parameter, which no wrapper knows of, and one that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layer, self.unused = nn.Linear(CLASSES, CLASSES, dtype=torch.double), nn.Parameter(torch.ones(1))

    def forward(self, step):
        return ((self.layer(step.logits) - step.teacher) ** 2).mean(-1)[step.labels != -100].mean()


def make(seed):
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES, dtype=torch.double)


def whole():
    """Labels that do not count are mostly one process's."""
    x, y = data(ROWS)
    y = y.clone()
    y[0:ROWS:4] = -100
    y[1] = -100
    return x.double(), y


def batches(rank, world):
    x, y = whole()
    return [(x[a : a + BATCH][rank::world], y[a : a + BATCH][rank::world]) for a in range(0, ROWS, BATCH)]


def train(rank, world, kind, folder):
    student = make(1 if rank == 0 else 50)  # the first one's is the one that counts
    objective = Projected() if kind == "objective" else None
    options = {} if objective is not None else {"temperature": 3.0}
    distiller = Distiller(
        DistributedDataParallel(student) if kind == "ddp" else student,
        make(2),
        objective=objective,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5),
        accumulate=3 if kind == "accumulate" else 1,
        folder=folder,
        **options,
    )
    history = distiller.fit(batches(rank, world), epochs=2, eval_loader=batches(rank, world), progress=False)
    return student, objective, history


KINDS = ("plain", "ddp", "accumulate", "objective")


def compare(rank, world, folder, expected):
    for kind in KINDS:
        student, objective, history = train(rank, world, kind, f"{folder}/{kind}")
        state = {**student.state_dict(), **(objective.state_dict() if objective is not None else {})}
        for name, value in expected[kind]["state"].items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9)
        for record, other in zip(history, expected[kind]["history"], strict=True):
            for name in ("loss", "accuracy", "agreement", "auroc", "cross_entropy"):
                assert record[name] == pytest.approx(other[name], rel=1e-5), (kind, name)
    resume(rank, world, f"{folder}/resume")


def resume(rank, world, folder):
    """Dropout's random numbers differ between processes, and every process resumes with its own."""

    def run(folder, epochs):
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES)).double()
        x, y = whole()
        dataset = torch.utils.data.TensorDataset(x, y)
        sampler = kdfast.cache.ElasticSampler(ROWS, BATCH, seed=1, rank=rank, world_size=world)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler)
        Distiller(model, folder=folder).fit(loader, epochs=epochs, progress=False)
        return model.state_dict()

    expected = run(None, 3)
    run(folder, 1)
    torch.manual_seed(99)
    for name, value in run(folder, 3).items():
        assert torch.equal(value, expected[name]), name


def test_two_processes_end_where_one_with_whole_batches_does(tmp_path):
    """One test, for it takes most of its time to start the processes."""
    expected = {}
    for kind in KINDS:
        student, objective, history = train(0, 1, "plain" if kind == "ddp" else kind, None)
        state = {**student.state_dict(), **(objective.state_dict() if objective is not None else {})}
        expected[kind] = {"state": {name: x.clone() for name, x in state.items()}, "history": history}
    processes.run(compare, 2, str(tmp_path), expected)
    for kind in KINDS:
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert names == {"last.pt", "best.pt", "log.jsonl", "curves.png"}
        assert len((tmp_path / kind / "log.jsonl").read_text().splitlines()) == 2


class Stream:
    """Batches whose number nobody knows before they end; ``broken`` is the place of one that cannot be read."""

    def __init__(self, batches, broken=None):
        self.of, self.broken = batches, broken

    def __iter__(self):
        for number, batch in enumerate(self.of):
            if number == self.broken:
                raise OSError("the disk")
            yield batch


def unequal(rank, world, folder):
    mine = batches(rank, world)

    def fit(loader, **options):
        return Distiller(make(1), make(2), **options).fit(loader, epochs=2, progress=False)

    with pytest.raises(ValueError, match=r"different numbers of batches, 3 in process 0, 2 in process 1: each must"):
        fit(mine[: 3 - rank])
    with pytest.raises(ValueError, match=r"3 in process 0, None in process 1"):
        fit(mine if rank == 0 else Stream(mine))
    with pytest.raises(ValueError, match=r"3 in process 0, 0 in process 1"):
        fit(mine if rank == 0 else [])
    with pytest.raises(ValueError, match=r"epoch 1, step 3: some processes have 1 batches and some 0: each must"):
        fit(Stream(mine[: 3 - rank]))
    with pytest.raises(ValueError, match=r"epoch 1, step 1: another .*|the loader is empty in epoch 1"):
        fit(Stream(mine if rank == 0 else []))
    with pytest.raises(OSError if rank else ValueError, match=r"the disk|step 2: another process could not read"):
        fit(Stream(mine, broken=1 if rank else None))

    class Interrupting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if rank == 1 and self.calls == 2 and not os.path.exists(f"{folder}/heard"):
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    def interrupted(folder, kind):
        torch.manual_seed(1)
        model = kind(FEATURES, CLASSES, dtype=torch.double)
        Distiller(model, make(2), folder=folder).fit(mine, epochs=1, progress=False)
        return model

    whole = interrupted(f"{folder}/whole", nn.Linear)
    with pytest.raises(KeyboardInterrupt):
        interrupted(f"{folder}/part", Interrupting)
    open(f"{folder}/heard", "w").close()
    again = interrupted(f"{folder}/part", Interrupting)
    assert again.calls < 3
    assert torch.equal(again.weight, whole.weight)


def test_processes_of_unequal_loaders_are_refused_and_stop_together(tmp_path):
    processes.run(unequal, 2, str(tmp_path))
