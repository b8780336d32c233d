"""DIST: the teacher's relations within rows and within columns, not its probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast._checks import check_number
from kdfast.objectives._rows import PairedRows, Teacher
from kdfast.objectives._vectors import unit

__all__ = ["dist_loss"]


def dist_loss(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """beta * (1 - mean over rows of rho(q_i, p_i)) + gamma * (1 - mean over classes of rho(q_:c, p_:c)).

    DIST (Huang et al. 2022): rho is Pearson's correlation of the student's and the teacher's probabilities, of a row
    (inter-class) and of a class over the batch's rows (intra-class). It is 0 where a side is constant, and has no
    gradient there: every class of a batch of one row.

    A correlation does not shrink as temperatures grow, so there is no T^2; the authors' code multiplies by it. It also
    has 1e-8 beside the lengths, which takes the correlation of an all but constant row or class to 0; here it stays
    what it is.

    Args:
        student: (..., C) logits.
        teacher: (..., C) logits, or dense or hidden soft labels.
        labels: only for ``ignore_index``: such rows are in no row's mean and in no class's correlation.

    Raises:
        TypeError, ValueError: bad arguments, labels that do not hold whole rows, numbers of classes that differ.
    """
    check_number("beta", beta)
    check_number("gamma", gamma)
    rows = PairedRows(student, teacher, labels, temperature=temperature, ignore_index=ignore_index)
    if not rows.counted.numel():
        return student.sum()
    q, p = rows.student_log_probs.exp(), rows.teacher_log_probs.exp()
    inter = rows.reduce(1.0 - _correlation(q, p, torch.ones_like(q[0], dtype=torch.bool)))
    intra = (1.0 - _correlation(q.T, p.T, rows.counted)).mean()
    return beta * inter + gamma * torch.where(rows.counted.any(), intra, 0.0)


def _correlation(x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """Pearson's along the last dimension, over the entries that count."""
    return (_standardized(x, counted) * _standardized(y, counted)).sum(-1)


def _standardized(x: Tensor, counted: Tensor) -> Tensor:
    mean = torch.where(counted, x, 0.0).sum(-1, keepdim=True) / counted.sum().clamp(min=1)
    low = torch.where(counted, x, math.inf).amin(-1, keepdim=True)
    high = torch.where(counted, x, -math.inf).amax(-1, keepdim=True)
    # What rounding leaves of a constant must not be taken for its variation.
    centred = torch.where(counted & (high > low), x - mean, 0.0)
    # The squares of small probabilities would underflow. No gradient is lost: the correlation does not depend on it.
    largest = centred.detach().abs().amax(-1, keepdim=True)
    return unit(centred / largest.masked_fill(largest == 0.0, 1.0))
