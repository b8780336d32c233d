"""A run whose student comes near the floor of a cache's labels says so, once, and trains as if nobody had looked."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kdfast.cache
from kdfast import Distiller, kd_loss
from kdfast.cache import PrototypeTable
from support.distillers import CLASSES, FEATURES, ROWS, quick, states_equal, student, teacher

FOUND = "nats from its labels, and these lie .* which is their floor"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(scope="module")
def x():
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, x):
    """Labels that are one prototype for all rows."""
    path = tmp_path_factory.mktemp("cache")
    even = torch.full((1, CLASSES), 1 / CLASSES)
    table = PrototypeTable.of(even, even)
    with torch.no_grad(), kdfast.cache.Writer(path, vocab_size=CLASSES, codec="prototype", prototypes=table, k=0) as w:
        for i, row in enumerate(teacher().eval()(x)):
            w.add(i, row * 3)
    return kdfast.cache.open(path)


def batches(x, size=8):
    return [{"input": x[i : i + size], "key": list(range(i, i + size))} for i in range(0, len(x), size)]


class Student(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.layers = student()
        self.scale = scale

    def forward(self, input):
        return self.layers(input) * self.scale


def fit(learner, labels, x, **options):
    given = {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0, **options.pop("kd", {})}
    distiller = Distiller(learner, labels, **given)
    return distiller.fit(batches(x), epochs=2, **{"log_every": 1, "progress": False, **options})


def test_a_student_near_the_floor_is_told_of_once(cache, x):
    assert cache.floor.kl > 0.1
    with pytest.warns(UserWarning, match=FOUND) as warned:
        fit(Student(), cache, x)
    (message,) = [str(w.message) for w in warned]
    assert f"these lie {cache.floor.kl:.2g} nats" in message
    assert 'codec="sample"' in message


def test_labels_that_batches_bring_are_a_cache_s_too(cache, x):
    dataset = kdfast.cache.CacheDataset(cache, range(ROWS), [{"input": row} for row in x])
    brought = DataLoader(dataset, 8, collate_fn=dataset.collate)
    with pytest.warns(UserWarning, match=FOUND):
        Distiller(Student(), temperature=1.0, kd_weight=1.0, ce_weight=0.0).fit(brought, epochs=1, progress=False)


def test_the_first_step_is_looked_at_and_then_those_of_the_log(cache, x, monkeypatch):
    calls = []

    def noted(*tensors, return_parts=False, **options):
        calls.append(return_parts)
        return kd_loss(*tensors, return_parts=return_parts, **options)

    monkeypatch.setattr("kdfast.distill.objective.kd_loss", noted)
    monkeypatch.setattr("kdfast.distill.objective.NEAR", 0.0)
    fit(Student(), cache, x, log_every=5)
    # Of 12 steps the first, the fifth and the tenth: their parts, and then their losses.
    assert "".join("p" if parts else "." for parts in calls) == "p....p.....p..."


def test_a_far_student_and_labels_without_a_floor_are_not(cache, x, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Student(scale=100.0), cache, x)
        for name, options in {"sample": {"draws": 9}, "topk": {"k": 2}}.items():
            with torch.no_grad(), kdfast.cache.Writer(tmp_path / name, vocab_size=CLASSES, codec=name, **options) as w:
                for i, row in enumerate(teacher().eval()(x)):
                    w.add(i, row * 3)
            divergence = {"divergence": "soft_ce"} if name == "sample" else {}
            fit(Student(), kdfast.cache.open(tmp_path / name), x, kd=divergence)
        # Not forward KL, not at the temperature of the labels, or an option that may count its calls.
        fit(Student(), cache, x, kd={"divergence": "reverse_kl"})
        fit(Student(), cache, x, kd={"kd_weight": lambda step: 1.0})
        fit(Student(), cache, x, kd={"kd_weight": 0.0, "z_weight": 1.0})
    with pytest.raises(ValueError, match=r"give the objective temperature=1\.0"):
        fit(Student(), cache, x, kd={"temperature": 2.0})


@pytest.mark.parametrize("backward", ["fused", "inplace"])
def test_the_student_is_trained_as_if_nobody_looked(cache, x, monkeypatch, backward):
    trained = []
    for looks in (True, False):
        learner = Student()
        torch.manual_seed(4)
        monkeypatch.setattr("kdfast.distill.objective.NEAR", 0.0)  # so that nothing is said, and all steps looked at
        if not looks:
            monkeypatch.setattr("kdfast.distill.objective.FloorWatch.see", lambda *_: None)
        fit(learner, cache, x, kd={"backward": backward})
        trained.append(learner.state_dict())
    states_equal(*trained)
