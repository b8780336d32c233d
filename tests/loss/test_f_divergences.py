"""Squared Hellinger and chi-squared, against their formulas as written, where probabilities underflow, and masked."""

import math

import pytest
import torch

from kdfast import kd_loss

FORMULAS = {
    "squared_hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square().sum(-1) / 2,
    "pearson_chi2": lambda p, q: ((p - q).square() / q).sum(-1),
    "neyman_chi2": lambda p, q: ((p - q).square() / p).sum(-1),
}
# What each is of forward KL where the student is near its teacher: f''(1) of the f-divergence.
OF_KL = {"squared_hellinger": 0.25, "pearson_chi2": 2.0, "neyman_chi2": 2.0}


def loss_and_gradient(student, teacher, name, **options):
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, divergence=name, reduction="sum", **options)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_the_formula(name, dtype):
    student, teacher = torch.randn(8, 37, dtype=torch.float64), torch.randn(8, 37, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    expected = 4.0 * FORMULAS[name]((teacher / 2).softmax(-1), (leaf / 2).softmax(-1)).sum()
    (slope,) = torch.autograd.grad(expected, leaf)
    loss, grad = loss_and_gradient(student.to(dtype), teacher.to(dtype), name, temperature=2.0)
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=exact, atol=0.0)
    assert (grad - slope).abs().max() <= exact * slope.abs().max()


@pytest.mark.parametrize("name", FORMULAS)
def test_near_the_teacher_the_gradient_is_a_multiple_of_forward_kl_s(name):
    """A difference of probabilities, or of their roots, would have lost its digits."""
    teacher = torch.randn(8, 1000)
    student = teacher + 1e-4 * torch.randn(8, 1000)
    _, grad = loss_and_gradient(student, teacher, name)
    _, forward_kl = loss_and_gradient(student.double(), teacher.double(), "forward_kl")
    assert (grad - OF_KL[name] * forward_kl).abs().max() <= 5e-3 * OF_KL[name] * forward_kl.abs().max()


@pytest.mark.parametrize("name", ["pearson_chi2", "neyman_chi2"])
def test_a_ratio_of_probabilities_that_underflow(name):
    """e^-120 / e^-110 and the like: either side is 0 in float32, their ratio squared over one is not."""
    near, far = torch.tensor([[0.0, -60.0]]), torch.tensor([[0.0, -110.0]])
    student, teacher = (far, near) if name == "pearson_chi2" else (near, far)
    loss, grad = loss_and_gradient(student, teacher, name)
    exact, slope = loss_and_gradient(student.double(), teacher.double(), name)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("name", "side", "finite"),
    [
        ("squared_hellinger", "student", True),
        ("squared_hellinger", "teacher", True),
        ("pearson_chi2", "student", False),
        ("pearson_chi2", "teacher", True),
        ("neyman_chi2", "student", True),
        ("neyman_chi2", "teacher", False),
    ],
)
def test_a_column_that_one_side_masks(name, side, finite):
    student, teacher = torch.randn(2, 40), torch.randn(2, 40)
    (student if side == "student" else teacher)[0, 3] = -math.inf
    loss, grad = loss_and_gradient(student, teacher, name)
    assert bool(loss.isfinite()) == finite
    assert finite or loss == math.inf
    assert grad.isfinite().all()
    if side == "student":
        assert grad[0, 3] == 0.0
    if finite:
        exact, slope = loss_and_gradient(student.double(), teacher.double(), name)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(grad.double(), slope, rtol=0.0, atol=1e-6 * float(slope.abs().max()))


@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name):
    student = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, teacher, divergence=name, temperature=1.5), student)
