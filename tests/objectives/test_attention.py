"""Attention transfer: maps, sizes, masks, and maps of nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.objectives import attention_transfer


def maps(features):
    """As the authors have them, (N, H W)."""
    return F.normalize(features.pow(2).mean(1).flatten(1))


def test_is_the_authors_times_the_number_of_positions():
    student, teacher = torch.randn(4, 3, 5, 6).double().requires_grad_(), torch.randn(4, 7, 5, 6).double()
    theirs = (maps(student) - maps(teacher)).square().mean()
    assert torch.allclose(attention_transfer(student, teacher), 30 * theirs)
    assert torch.autograd.gradcheck(lambda s: attention_transfer(s, teacher), student)


def test_by_hand():
    # Energies (3, 4) and (4, 3) over 5: the difference is (-1, 1) / 5.
    student = torch.tensor([[[[1.0, 2.0]], [[math.sqrt(2), 0.0]]]])
    teacher = torch.tensor([[[[2.0, math.sqrt(3)]]]])
    assert attention_transfer(student, teacher).item() == pytest.approx(2 / 25)


def test_scale_sign_and_width_do_not_matter():
    student = torch.randn(4, 3, 5, 5)
    assert attention_transfer(-7 * student, student).item() == pytest.approx(0.0, abs=1e-6)
    assert attention_transfer(student.repeat(1, 2, 1, 1), student).item() == pytest.approx(0.0, abs=1e-6)


def test_opposite_maps_are_two_apart():
    student, teacher = torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4)
    student[..., :2], teacher[..., 2:] = 1.0, 1.0
    assert attention_transfer(student, teacher).item() == pytest.approx(2.0)


def test_the_larger_map_is_averaged_axis_by_axis():
    student, teacher = torch.randn(2, 3, 8, 4).double(), torch.randn(2, 5, 4, 12).double()
    energy_s = F.adaptive_avg_pool2d(student.square().sum(1), (4, 4))
    energy_t = F.adaptive_avg_pool2d(teacher.square().sum(1), (4, 4))
    expected = (F.normalize(energy_s.flatten(1)) - F.normalize(energy_t.flatten(1))).square().sum(1).mean()
    assert torch.allclose(attention_transfer(student, teacher), expected)


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 3, 2, 4, 4)])
def test_sequences_and_volumes(shape):
    student = torch.randn(*shape).double()
    assert attention_transfer(student, student).item() == pytest.approx(0.0, abs=1e-12)
    other = torch.randn(*shape).double()
    assert attention_transfer(other, student) > 0.01
    smaller = other[:, :4] if len(shape) == 3 else other[..., :2]
    assert attention_transfer(smaller, student) > 0.01


def test_sequences_have_their_features_last():
    student, teacher = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 5).double()
    as_maps = attention_transfer(student.mT[..., None], teacher.mT[..., None])
    assert torch.allclose(attention_transfer(student, teacher), as_maps)


def test_padding_does_not_count():
    student, teacher = torch.randn(3, 6, 3).double(), torch.randn(3, 6, 5).double()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = mask[2] = False
    expected = attention_transfer(student[:2, :4], teacher[:2, :4])
    student[0, 5], teacher[2, 1] = math.nan, math.nan
    leaf = student.requires_grad_()
    loss = attention_transfer(leaf, teacher, mask)
    assert torch.allclose(loss, expected)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad[~mask] == 0.0).all()
    assert grad[mask].isfinite().all()


def test_a_map_of_zeros_has_a_finite_gradient():
    student = torch.zeros(2, 3, 4, 4)
    student[1] = torch.randn(3, 4, 4)
    leaf = student.requires_grad_()
    (grad,) = torch.autograd.grad(attention_transfer(leaf, torch.randn(2, 5, 4, 4)), leaf)
    assert (grad[0] == 0.0).all()
    assert grad[1].abs().max() > 0.0
    assert grad.isfinite().all()


ERRORS = {
    "two dimensions": (torch.randn(2, 3), torch.randn(2, 3), None, r"student must have 3 or 4 or 5 .*\(2, 3\)"),
    "dimensions differ": (torch.randn(2, 3, 4), torch.randn(2, 3, 4, 4), None, "differ in dimensions"),
    "samples": (torch.randn(2, 3, 4), torch.randn(3, 3, 4), None, "student has 2 samples, teacher 3"),
    "gradient": (torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True), None, "teacher requires grad"),
    "mask of other sizes": (
        torch.randn(2, 3, 4),
        torch.randn(2, 6, 4),
        torch.ones(2, 3, dtype=torch.bool),
        r"mask must be a bool tensor of \(2, 6\), got torch.bool \(2, 3\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    student, teacher, mask, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        attention_transfer(student, teacher, mask)
