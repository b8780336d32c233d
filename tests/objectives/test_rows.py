"""``kd_loss``'s rules about rows hold for every loss on rows of logits."""

import math

import pytest
import torch

from kdfast import SoftLabels
from kdfast.objectives import (
    class_weighted_ce,
    dist_loss,
    entropy_matching,
    margin_ce,
    pairwise_hinge,
    teacher_argmax_ce,
)

IGNORE = -100
WEIGHTS = torch.rand(7, generator=torch.Generator().manual_seed(1))
LOSSES = {
    "margin_ce": lambda s, t, y, **options: margin_ce(s, y, 0.5, **options),
    "pairwise_hinge": lambda s, t, y, **options: pairwise_hinge(s, y, 4.0, **options),
    "entropy_matching": entropy_matching,
    "class_weighted_ce": lambda s, t, y, **options: class_weighted_ce(s, t, WEIGHTS, y, **options),
    "teacher_argmax_ce": teacher_argmax_ce,
}
TAKE_A_TEACHER = ["entropy_matching", "class_weighted_ce", "teacher_argmax_ce"]


def batch(*shape):
    labels = torch.randint(0, 7, shape)
    return torch.randn(*shape, 7).double(), torch.randn(*shape, 7).double(), labels


@pytest.mark.parametrize("name", LOSSES)
def test_reductions(name):
    loss, (student, teacher, labels) = LOSSES[name], batch(2, 3)
    labels[0, 1] = IGNORE
    rows = loss(student, teacher, labels, reduction="none")
    assert rows.shape == (2, 3)
    assert rows[0, 1] == 0.0
    assert torch.allclose(loss(student, teacher, labels), rows.sum() / 5)
    assert torch.allclose(loss(student, teacher, labels, reduction="sum"), rows.sum())
    assert torch.allclose(loss(student, teacher, labels, num_items=11), rows.sum() / 11)
    weight = torch.rand(2, 3)
    assert torch.allclose(loss(student, teacher, labels, row_weight=weight), (weight * rows).sum() / 5)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert torch.allclose(loss(student, teacher, labels, row_weight=mask), (rows * mask).sum() / 2)


@pytest.mark.parametrize("name", [*LOSSES, "dist_loss"])
def test_rows_that_do_not_count_get_exactly_nothing(name):
    loss = {**LOSSES, "dist_loss": dist_loss}[name]
    student, teacher, labels = batch(5)
    labels[1] = labels[4] = IGNORE
    kept = labels != IGNORE
    expected = loss(student[kept], teacher[kept], labels[kept])
    student[1], teacher[4] = math.nan, math.nan
    leaf = student.requires_grad_()
    value = loss(leaf, teacher, labels)
    assert torch.allclose(value, expected)
    (grad,) = torch.autograd.grad(value, leaf)
    assert (grad[~kept] == 0.0).all()
    assert (grad[kept].abs().sum(1) > 0.0).all()


@pytest.mark.parametrize("name", [*LOSSES, "dist_loss"])
def test_nothing_counted_is_zero_with_a_graph(name):
    loss = {**LOSSES, "dist_loss": dist_loss}[name]
    for rows in (0, 3):
        student, teacher, labels = batch(rows)
        leaf = student.requires_grad_()
        value = loss(leaf, teacher, torch.full_like(labels, IGNORE))
        assert value == 0.0
        assert (torch.autograd.grad(value, leaf)[0] == 0.0).all()


@pytest.mark.parametrize("name", [*TAKE_A_TEACHER, "dist_loss"])
def test_dense_soft_labels_are_the_teacher(name):
    loss = {**LOSSES, "dist_loss": dist_loss}[name]
    student, teacher, _ = batch(2, 3)
    rows = teacher.view(6, 7)
    assert torch.allclose(loss(student, SoftLabels.dense(rows), None), loss(student, teacher, None))
    present = torch.tensor([True, True, False, True, False, True])
    some = loss(student, SoftLabels.dense(rows, present=present), None)
    assert torch.allclose(some, loss(student.view(6, 7)[present], rows[present], None))


@pytest.mark.parametrize("name", LOSSES)
def test_narrow_types_are_computed_in_float32(name):
    student, teacher, labels = batch(6)
    narrow = LOSSES[name](student.bfloat16(), teacher.bfloat16(), labels)
    exact = LOSSES[name](student.bfloat16().double(), teacher.bfloat16().double(), labels)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), exact, rtol=1e-5)
