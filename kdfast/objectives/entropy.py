"""Students that are as sure as their teacher."""

from __future__ import annotations

import math

from torch import Tensor

from kdfast._checks import check_flags
from kdfast.objectives._rows import PairedRows, Teacher

__all__ = ["entropy_matching"]


def entropy_matching(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    squared: bool = True,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """(H(p) - H(q))^2, or |H(p) - H(q)|, of teacher p and student q, in nats::

        (Categorical(logits=teacher / T).entropy() - Categorical(logits=student / T).entropy()).square().mean()

    It matches how sure the two are, not of what: a term beside a divergence, not instead of one. An article calls
    ``-log <p, q>`` an entropy loss; that is least at the one-hot of the teacher's likeliest class, not at q = p.

    Args:
        student: (..., C) logits.
        teacher: (..., C) logits, or dense or hidden soft labels. ``-inf`` is a class of probability 0.
        labels: only for ``ignore_index``.
        temperature: of both sides; the entropies are not scaled by its square.
        row_weight, ignore_index, reduction, num_items: as in ``kd_loss``.

    Raises:
        TypeError, ValueError: bad arguments, labels that do not hold whole rows, numbers of classes that differ.
    """
    check_flags(squared=squared)
    rows = PairedRows(
        student,
        teacher,
        labels,
        temperature=temperature,
        row_weight=row_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )
    gap = _entropy(rows.teacher_log_probs) - _entropy(rows.student_log_probs)
    return rows.reduce(gap.square() if squared else gap.abs())


def _entropy(log_probs: Tensor) -> Tensor:
    # 0 log 0 is 0 here as 1 log 1, whose gradient is finite, too.
    log_probs = log_probs.masked_fill(log_probs == -math.inf, 0.0)
    return -(log_probs.exp() * log_probs).sum(-1)
