"""DIST against correlations computed by NumPy, and where correlations are not defined."""

import math

import numpy as np
import pytest
import torch

from kdfast.objectives import dist_loss


def by_numpy(student, teacher, temperature, beta, gamma):
    q, p = ((x / temperature).softmax(-1).detach().numpy() for x in (student, teacher))
    inter = np.mean([np.corrcoef(q[i], p[i])[0, 1] for i in range(q.shape[0])])
    intra = np.mean([np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(q.shape[1])])
    return beta * (1 - inter) + gamma * (1 - intra)


def batch(rows=6, classes=5):
    return torch.randn(rows, classes).double().requires_grad_(), torch.randn(rows, classes).double()


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.0), (0.0, 3.0)])
def test_is_pearsons_correlation_within_rows_and_classes(beta, gamma):
    student, teacher = batch()
    options = {"temperature": 2.0, "beta": beta, "gamma": gamma}
    assert dist_loss(student, teacher, **options).item() == pytest.approx(by_numpy(student, teacher, 2.0, beta, gamma))
    assert torch.autograd.gradcheck(lambda s: dist_loss(s, teacher, **options), student)


def test_leading_dimensions_are_rows():
    student, teacher = batch()
    assert torch.equal(dist_loss(student.view(2, 3, 5), teacher.view(2, 3, 5)), dist_loss(student, teacher))


def test_the_teacher_is_the_optimum_and_its_opposite_is_not():
    _, teacher = batch()
    assert dist_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-12)
    assert dist_loss(-teacher, teacher) > 2.0


def test_temperature_does_not_shrink_the_gradient():
    """Why there is no T^2: KL's gradient is a 64th of itself between these two."""
    student, teacher = batch()
    norms = [torch.autograd.grad(dist_loss(student, teacher, temperature=t), student)[0].norm() for t in (8.0, 64.0)]
    assert norms[1] > 0.5 * norms[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_constant_rows_and_classes_have_correlation_zero(side, dtype):
    student, teacher = (x.detach().to(dtype) for x in batch(6, 49))
    constant = student if side == "student" else teacher
    constant[2] = 0.3  # 1 / 49 each, whose mean is not exactly that
    others = torch.arange(6) != 2
    leaf = student.requires_grad_()
    loss = dist_loss(leaf, teacher, gamma=0.0)
    assert torch.allclose(loss, (dist_loss(student[others], teacher[others], gamma=0.0) * 5 + 1.0) / 6)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad[2] == 0.0).all()
    assert (grad[others].abs().sum(1) > 0.0).all()


def test_one_row_has_no_classes_to_correlate():
    student, teacher = batch(1)
    assert dist_loss(student, teacher, beta=0.0).item() == 1.0
    (grad,) = torch.autograd.grad(dist_loss(student, teacher, beta=0.0), student)
    assert (grad == 0.0).all()
    assert dist_loss(student, teacher, gamma=0.0) != 1.0


def test_tiny_probabilities_keep_their_relations():
    """Squares of 1e-26 would underflow in float32."""
    student, teacher = (x.detach().float() for x in batch())
    student[:, 1] -= 60.0
    teacher[:, 1] -= 60.0
    exact = dist_loss(student.double(), teacher.double())
    assert torch.allclose(dist_loss(student, teacher).double(), exact, rtol=1e-5)


def test_masked_classes():
    student, teacher = batch()
    student.data[:, 4], teacher[:, 4] = -math.inf, -math.inf
    loss = dist_loss(student, teacher)
    assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.isfinite().all()
    assert (grad[:, 4] == 0.0).all()
