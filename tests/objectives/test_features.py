"""Hints: their distances, their projector, and positions that do not count."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.objectives import Hint, Projector

BY_TORCH = {
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1).mean(),
}


@pytest.mark.parametrize("kind", BY_TORCH)
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_distances_of_equal_widths_are_torchs(kind, shape):
    student, teacher = torch.randn(*shape).double().requires_grad_(), 3 * torch.randn(*shape).double()
    hint = Hint(6, 6, kind)
    assert not list(hint.parameters())
    assert torch.allclose(hint(student, teacher), BY_TORCH[kind](student, teacher))
    assert torch.autograd.gradcheck(lambda s: hint(s, teacher), student)


@pytest.mark.parametrize("kind", BY_TORCH)
def test_the_projector_of_maps_is_a_convolution(kind):
    hint = Hint(3, 5, kind, dim=1).double()
    student, teacher = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 5, 4, 4).double()
    layer = hint.projector.map
    projected = F.conv2d(student, layer.weight[:, :, None, None], layer.bias)
    assert torch.allclose(hint.projector(student), projected)
    assert torch.allclose(hint(student, teacher), BY_TORCH[kind](projected.movedim(1, -1), teacher.movedim(1, -1)))


@pytest.mark.parametrize("kind", BY_TORCH)
def test_training_reaches_student_and_projector(kind):
    hint, teacher = Hint(3, 5, kind), torch.randn(4, 5)
    student = torch.randn(4, 3, requires_grad=True)
    optimizer = torch.optim.SGD([student, *hint.parameters()], lr=0.1)
    before = hint(student, teacher)
    before.backward()
    assert student.grad.abs().max() > 0.0
    assert all(p.grad.abs().max() > 0.0 for p in hint.parameters())
    optimizer.step()
    assert hint(student, teacher) < before


@pytest.mark.parametrize("kind", BY_TORCH)
def test_masked_positions_do_not_count(kind):
    hint = Hint(3, 5, kind).double()
    student, teacher = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 5).double()
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    expected = hint(student[mask], teacher[mask])
    student[0, 2], teacher[1, 3] = math.nan, math.nan
    leaf = student.requires_grad_()
    loss = hint(leaf, teacher, mask)
    assert torch.allclose(loss, expected)
    loss.backward()
    assert (leaf.grad[~mask] == 0.0).all()
    assert all(p.grad.isfinite().all() for p in hint.parameters())
    assert hint(leaf, teacher, torch.zeros_like(mask)) == 0.0


def test_a_zero_vector_has_cosine_zero_and_no_gradient():
    """PyTorch's cosine has a gradient of 1e8 there."""
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    student[1] = 0.0
    leaf = student.requires_grad_()
    loss = Hint(6, 6, "cosine")(leaf, teacher)
    others = F.cosine_similarity(student[[0, 2]], teacher[[0, 2]]).sum()
    assert torch.allclose(loss, (3 - others) / 3)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad[1] == 0.0).all()


def test_narrow_features_are_compared_in_float32():
    student, teacher = torch.full((2, 4), 400.0).half(), torch.zeros(2, 4).half()
    assert Hint(4, 4)(student, teacher).item() == 160_000.0  # above the largest float16
    long = 150 * student
    assert Hint(4, 4, "cosine")(long, long).item() == pytest.approx(0.0, abs=1e-6)  # and so is its length


ERRORS = {
    "kind": (lambda: Hint(3, 5, "l2"), "kind must be one of mse, cosine, smooth_l1, got 'l2'"),
    "width": (lambda: Projector(0, 5), "student_width must be at least 1, got 0"),
    "student's width": (lambda: Hint(3, 5)(torch.randn(2, 4), torch.randn(2, 5)), r"student must have 3 .*\(2, 4\)"),
    "teacher's width": (lambda: Hint(3, 5)(torch.randn(2, 3), torch.randn(2, 6)), r"teacher must have 5 .*\(2, 6\)"),
    "no such dimension": (lambda: Hint(3, 5, dim=2)(torch.randn(2, 3), torch.randn(2, 5)), "dimension 2"),
    "sizes": (
        lambda: Hint(3, 5, dim=1)(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)),
        r"\(2, 3, 4, 4\) and teacher \(2, 5, 2, 2\) may differ in dimension 1 only: pool",
    ),
    "mask": (
        lambda: Hint(3, 3)(torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.ones(2, 3, dtype=torch.bool)),
        r"mask must be a bool tensor of \(2, 4\), got torch.bool \(2, 3\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
