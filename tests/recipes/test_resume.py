"""Every recipe with a state resumes bit by bit where it was stopped, and a folder holds the parts of one recipe."""

from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from kdfast import Distiller
from kdfast.distill import KD
from kdfast.recipes import (
    AdaptiveKD,
    Adversarial,
    Bootstrap,
    BornAgain,
    Chain,
    Cohort,
    Combined,
    CrossDomain,
    EachStudent,
    Growing,
    MutualLearning,
    TeacherAssistants,
    add_lora,
    anneal,
    deepen,
    discriminator,
    ramp_up,
    self_distillation,
    widen,
)
from support.distillers import quick
from support.recipes import batches, blobs


class Stop(Exception):
    pass


class Batches(list):
    """Batches that end the run at the place ``stop`` of all that it asks for."""

    def __init__(self, items, stop):
        super().__init__(items)
        self.stop, self.given = stop, 0

    def __iter__(self):
        for item in list.__iter__(self):
            if self.given == self.stop:
                raise Stop
            self.given += 1
            yield item


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    quick(monkeypatch)


def net(hidden=8):
    """With dropout and batch norm: random numbers and running statistics matter."""
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3))


PLAN = {"epochs": 2, "checkpoint_every": 1, "progress": False}


def simple(folder, data, **options):
    plan = {name: options.pop(name) for name in ("eval_loader", "monitor", "metrics") if name in options}
    model = options.pop("model", None) or net()
    distiller = Distiller(model, net(12), folder=folder, **options)
    distiller.fit(data, **PLAN, **plan)
    return [model, *(x for x in [distiller.objective] if isinstance(x, nn.Module))]


def lora(folder, data):
    model = net()
    add_lora(model, rank=1)
    return simple(folder, data, model=model)


def ema(folder, data):
    distiller = self_distillation(net(), decay=0.9, folder=folder)
    distiller.fit(data, **PLAN)
    return [distiller.student, *distiller.teachers.members]


def chain(folder, data, kind=Chain, sizes=(8, 8)):
    students = [net(size) for size in sizes]
    kind(net(12), students, folder=folder).fit(data, **PLAN)
    return students


def bootstrap(folder, data):
    models = net(), net()
    Bootstrap(*models, hard_share=0.5, folder=folder).fit(data, rounds=2, **PLAN)
    return models


def adaptive(folder, data):
    model = net()
    measured = {"eval_loader": [blobs(seed=3)], "metrics": ["accuracy"]}
    AdaptiveKD(model, net(12), teacher_score=1.5, folder=folder, lr=0.01).fit(data, rounds=2, **measured, **PLAN)
    return [model]


def crossing(folder, data):
    models = net(), net()
    CrossDomain(*models, folder=folder).fit(data, data, rounds=2, **PLAN)
    return models


def growing(folder, data):
    recipe = Growing(net(), net(12), grow=lambda model: deepen(widen(model, 0, 10), 0), folder=folder)
    recipe.fit(data, **PLAN)
    return [recipe.student]


def scheduled(make):
    return lambda optimizer, steps, epochs: make(optimizer)


RECIPES = {
    "plain": simple,
    "accumulated": partial(simple, accumulate=2, clip_norm=0.1),
    "annealed": partial(simple, temperature=anneal(8.0, 1.0), kd_weight=ramp_up(1.0)),
    "cosine": partial(simple, schedule="cosine"),
    "one cycle": partial(simple, schedule=scheduled(partial(OneCycleLR, max_lr=0.1, total_steps=6))),
    "cyclic": partial(
        simple,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        schedule=scheduled(partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2)),
    ),
    "plateau": partial(simple, schedule=scheduled(partial(ReduceLROnPlateau, patience=0)), monitor="loss"),
    "evaluated": partial(simple, eval_loader=[blobs(seed=4)], metrics=["accuracy"]),
    "half": partial(simple, amp=torch.bfloat16),
    "scaled": partial(simple, amp=torch.float16),
    "adversarial": lambda folder, data: simple(
        folder, data, objective=Combined(KD(), Adversarial(discriminator(3), weight=0.1))
    ),
    "cohort": lambda folder, data: simple(folder, data, model=Cohort(net(), net()), objective=EachStudent(KD())),
    "mutual": lambda folder, data: simple(folder, data, model=Cohort(net(), net()), objective=MutualLearning()),
    "lora": lora,
    "ema": ema,
    "chain": chain,
    "assistants": partial(chain, kind=TeacherAssistants, sizes=(10, 6)),
    "born again": partial(chain, kind=BornAgain),
    "bootstrap": bootstrap,
    "adaptive": adaptive,
    "cross-domain": crossing,
    "growing": growing,
}


def state(models):
    return [tensor for model in models for tensor in model.state_dict().values()]


def run(name, folder, stop=-1, examples=None):
    torch.manual_seed(1)
    data = Batches(batches(*blobs(40 if examples is None else examples), size=16), stop)
    return RECIPES[name](folder, data), data.given


@pytest.mark.parametrize("name", RECIPES)
def test_it_resumes_bit_by_bit(name, tmp_path):
    whole, given = run(name, tmp_path / "whole")
    for place in sorted({given // 2, given - 1}):
        folder = tmp_path / f"{place}"
        with suppress(Stop):
            run(name, folder, place)
        again, _ = run(name, folder)
        assert all(torch.equal(a, b) for a, b in zip(state(whole), state(again), strict=True)), place


@pytest.mark.parametrize("name", ["chain", "bootstrap", "adaptive", "cross-domain", "growing"])
def test_the_parts_of_a_recipe_are_of_one_plan(name, tmp_path, monkeypatch):
    first, _ = run(name, tmp_path)
    monkeypatch.setitem(PLAN, "epochs", 4)
    with pytest.raises(ValueError, match=r"plan.json is of a recipe with .*epochs=2.*this one has .*4.*resume=False"):
        run(name, tmp_path)
    monkeypatch.setitem(PLAN, "resume", False)
    again, _ = run(name, tmp_path)
    assert not all(torch.equal(a, b) for a, b in zip(state(first), state(again), strict=True))
    monkeypatch.delitem(PLAN, "resume")
    resumed, given = run(name, tmp_path)
    assert given <= 1  # growth looks at a batch
    assert all(torch.equal(a, b) for a, b in zip(state(again), state(resumed), strict=True))


def test_another_growth_is_another_recipe(tmp_path):
    for width in (10, 12):
        recipe = Growing(net(), net(12), grow=lambda model, width=width: widen(model, 0, width), folder=tmp_path)
        torch.manual_seed(0)
        if width == 10:
            recipe.fit(batches(*blobs()), **PLAN)
    with pytest.raises(ValueError, match=r"with grow.width=10; this one has grow.width=12"):
        recipe.fit(batches(*blobs()), **PLAN)


def test_another_generation_may_follow(tmp_path):
    torch.manual_seed(1)
    taught_by, one, two = net(12), net(), net()
    data = Batches(batches(*blobs()), -1)
    Chain(taught_by, [one], folder=tmp_path).fit(data, **PLAN)
    given = data.given
    Chain(taught_by, [net(), two], folder=tmp_path).fit(data, **PLAN)
    assert data.given == 2 * given
