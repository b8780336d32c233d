"""Temperatures per row, and numbers that change over the training."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdfast.distill import KD, Step
from kdfast.recipes import (
    anneal,
    entropy_temperature,
    focal_temperature,
    ramp_up,
    row_losses,
    soft_targets,
    temperature_of_entropy,
)
from support.recipes import entropy, make_step


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_rows_of_equal_entropy(share):
    teacher = torch.randn(20, 7, dtype=torch.float64) * 4
    teacher[:, 2] = -torch.inf
    tau = temperature_of_entropy(teacher, share, low=1e-3, high=1e3)
    assert torch.allclose(entropy(teacher / tau[:, None]), torch.full((20,), share * math.log(6)).double(), atol=1e-9)


def test_temperatures_stay_within_bounds():
    teacher = torch.tensor([[100.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert temperature_of_entropy(teacher, 0.9, low=0.5, high=4.0).tolist() == pytest.approx([4.0, 0.5])


def test_a_temperature_per_row_reaches_the_loss():
    step = make_step()
    tau = entropy_temperature(0.5)(step)
    rows = tau**2 * row_losses(
        replace(step, student=step.student / tau[:, None], teacher=step.teacher / tau[:, None]), by="kd"
    )
    assert torch.allclose(soft_targets(temperature=entropy_temperature(0.5))(step), rows.mean(), rtol=1e-9)


def test_focal_temperatures_fall_with_distance():
    step = make_step(rows=8)
    step.labels[0] = -100
    tau = focal_temperature(8.0, 1.0, gamma=2.0)(step)
    distance = 1 - F.cosine_similarity(step.student, step.teacher).detach()
    expected = 8.0 + (distance[1:] ** 2).mean() - distance**2
    assert torch.allclose(tau, expected)
    with pytest.raises(ValueError, match=r"base must exceed beta \* 2\*\*gamma"):
        focal_temperature(4.0, 1.0, gamma=2.0)


def test_schedules():
    at = {x: Step(None, progress=x) for x in (0.0, 0.1, 0.25, 0.5, 1.0)}
    assert [anneal(8.0, 1.0)(step) for step in at.values()] == pytest.approx([8.0, 7.3, 6.25, 4.5, 1.0])
    assert anneal(8.0, 1.0, "cosine")(at[0.25]) == pytest.approx(1.0 + 7.0 * (1 + math.sqrt(0.5)) / 2)
    assert ramp_up(2.0)(at[0.0]) == pytest.approx(2.0 * math.exp(-5))
    assert ramp_up(2.0)(at[0.1]) == pytest.approx(2.0 * math.exp(-1.25))
    assert ramp_up(2.0)(at[0.25]) == 2.0
    with pytest.raises(ValueError, match='"linear" or "cosine"'):
        anneal(8.0, 1.0, "step")
    with pytest.raises(ValueError, match="share must be in"):
        ramp_up(1.0, 0.0)


def test_an_annealed_loss_is_the_one_at_its_temperature():
    step = make_step(progress=0.5)
    assert torch.equal(KD(temperature=anneal(4.0, 2.0))(step), KD(temperature=3.0)(step))
