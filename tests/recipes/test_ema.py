"""Self-distillation: the average's formula, its buffers, when it moves, and that it is kept."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from kdfast.distill import KD
from kdfast.recipes import EMATeacher, ramp_up, self_distillation
from support.recipes import batches, blobs, mlp, weights_of


def students(count):
    """A model, and the weights that it takes on one after another."""
    model = nn.Linear(3, 2).double()
    states = [{name: torch.randn_like(x) for name, x in model.state_dict().items()} for _ in range(count)]
    return model, states


@pytest.mark.parametrize(("decay", "warm_up"), [(0.9, False), (0.9, True), (0.5, True), (0.0, False)])
def test_the_average_is_the_formula(decay, warm_up):
    model, states = students(6)
    teacher, expected = EMATeacher(model, decay, warm_up=warm_up), model.weight.detach().clone()
    for n, state in enumerate(states):
        model.load_state_dict(state)
        teacher.update_parameters(model)
        a = min(decay, 1 - 1 / (n + 1)) if warm_up else decay
        expected = a * expected + (1 - a) * state["weight"]
        assert torch.allclose(teacher.module.weight, expected, rtol=1e-12)


def test_a_warm_up_begins_with_plain_means():
    model, states = students(3)
    teacher = EMATeacher(model, 0.99)
    for state in states:
        model.load_state_dict(state)
        teacher.update_parameters(model)
    assert torch.allclose(teacher.module.weight, sum(state["weight"] for state in states) / 3)


def test_buffers_are_the_students():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = EMATeacher(model, 0.9, warm_up=False)
    model(torch.randn(8, 3))
    teacher.update_parameters(model)
    assert torch.equal(teacher.module[1].running_mean, model[1].running_mean)
    assert int(teacher.module[1].num_batches_tracked) == 1


def test_it_resumes_from_its_state():
    model, states = students(6)
    whole, stopped = EMATeacher(model, 0.9), EMATeacher(model, 0.9)
    for n, state in enumerate(states):
        if n == 3:
            saved = copy.deepcopy(stopped.state_dict())
            stopped = EMATeacher(nn.Linear(3, 2).double(), 0.9)
            stopped.load_state_dict(saved)
        model.load_state_dict(state)
        whole.update_parameters(model)
        stopped.update_parameters(model)
    assert torch.equal(weights_of(whole), weights_of(stopped))


def test_the_average_follows_each_step_of_the_optimizer_and_no_batch():
    torch.manual_seed(1)
    student, data = mlp(), batches(*blobs(), size=8)
    by_hand = EMATeacher(student, 0.8)
    distiller = self_distillation(student, decay=0.8, accumulate=2, optimizer=partial(torch.optim.SGD, lr=0.1))
    distiller.optimizer.register_step_post_hook(lambda *_: by_hand.update_parameters(student))
    distiller.fit(data, epochs=1, progress=False)
    (teacher,) = distiller.teachers.members
    assert int(teacher.n_averaged) == len(data) // 2
    assert torch.equal(weights_of(teacher), weights_of(by_hand))
    assert not torch.equal(weights_of(teacher), weights_of(student))


def test_the_teacher_is_not_trained_and_is_in_the_state():
    distiller = self_distillation(mlp(), objective=KD(temperature=1.0, kd_weight=ramp_up(1.0), ce_weight=1.0))
    (teacher,) = distiller.teachers.members
    held = {id(x) for group in distiller.optimizer.param_groups for x in group["params"]}
    assert not held & {id(x) for x in teacher.parameters()}
    assert "teacher.n_averaged" in distiller.objective.state_dict()
    before = weights_of(teacher)
    distiller.step(blobs()).backward()
    assert torch.equal(weights_of(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_learns_from_itself():
    torch.manual_seed(1)
    data = batches(*blobs())
    history = self_distillation(mlp(), decay=0.9, lr=0.02).fit(data, epochs=8, eval_loader=data, progress=False)
    assert history[-1]["accuracy"] > 0.9


class Stopped(Exception):
    pass


def test_a_resumed_run_has_the_average_of_a_whole_one(tmp_path):
    data = batches(*blobs())

    def run(folder, on_epoch=None):
        torch.manual_seed(1)
        distiller = self_distillation(mlp(), decay=0.9, folder=folder)
        distiller.fit(data, epochs=4, progress=False, on_epoch=on_epoch)
        return distiller.teachers.members[0]

    def stop(record):
        if record["epoch"] == 3:
            raise Stopped

    whole, trained = run(tmp_path / "whole"), []
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", stop)
    resumed = run(tmp_path / "stopped", lambda record: trained.append(record["epoch"]))
    assert trained == [3, 4]
    assert int(resumed.n_averaged) == 4 * len(data)
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_misuse():
    model = mlp()
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1\.0"):
        EMATeacher(model, 1.0)
    with pytest.raises(TypeError, match="makes an optimizer of the parameters, got an optimizer"):
        self_distillation(model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
