"""Entropy matching: its value, its gradient, and what it cannot see."""

import math

import pytest
import torch
from torch.distributions import Categorical

from kdfast import kd_loss
from kdfast.objectives import entropy_matching


def gap(student, teacher, temperature=1.0):
    return Categorical(logits=teacher / temperature).entropy() - Categorical(logits=student / temperature).entropy()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_is_the_gap_of_entropies(temperature):
    student, teacher = torch.randn(2, 3, 9).double().requires_grad_(), torch.randn(2, 3, 9).double()
    exact = gap(student, teacher, temperature)
    assert torch.allclose(entropy_matching(student, teacher, temperature=temperature), exact.square().mean())
    plain = entropy_matching(student, teacher, temperature=temperature, squared=False)
    assert torch.allclose(plain, exact.abs().mean())
    assert torch.autograd.gradcheck(lambda s: entropy_matching(s, teacher, temperature=temperature), student)
    assert torch.autograd.gradcheck(lambda s: entropy_matching(s, teacher, squared=False), student)


def test_a_temperature_per_row():
    student, teacher = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    tau = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    assert torch.allclose(
        entropy_matching(student, teacher, temperature=tau), gap(student, teacher, tau[:, None]).square().mean()
    )


def test_masked_classes_have_no_entropy_and_no_gradient():
    student, teacher = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    student[:, 6:], teacher[:, 5:] = -math.inf, -math.inf
    leaf = student.clone().requires_grad_()
    loss = entropy_matching(leaf, teacher)
    assert torch.allclose(loss, gap(student[:, :6], teacher[:, :5]).square().mean())
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad[:, :6].abs().min() > 0.0
    assert (grad[:, 6:] == 0.0).all()


def test_extreme_logits():
    student, teacher = torch.randn(4, 9) * 300, torch.randn(4, 9) * 1e4
    leaf = student.requires_grad_()
    loss = entropy_matching(leaf, teacher)
    assert torch.allclose(loss.double(), entropy_matching(student.double(), teacher.double()), atol=1e-6)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


def test_it_knows_nothing_of_classes():
    """Why it stands beside a divergence: every permutation of the teacher has its entropy."""
    teacher = torch.randn(4, 9).double()
    assert entropy_matching(teacher.flip(-1), teacher).item() == pytest.approx(0.0, abs=1e-20)
    assert kd_loss(teacher.flip(-1), teacher) > 0.1
