"""Losses that want the label's logit ahead of the others by a margin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdfast._checks import check_number
from kdfast.loss import checks
from kdfast.loss.kd_loss import kd_loss
from kdfast.models import check_logits
from kdfast.objectives._rows import CountedRows

__all__ = ["margin_ce", "pairwise_hinge"]


def margin_ce(logits: Tensor, labels: Tensor, margin: float = 1.0, **options: Any) -> Any:
    """Cross-entropy with ``margin`` taken off the label's logit, CE(z_y - m) (additive margin, Wang et al. 2018)::

        F.cross_entropy(logits - margin * F.one_hot(labels, C), labels)

    It has no dead zone: its gradient at the label is q_y - 1 of the lowered logits, largest where the student is worst.
    ``-sum t log(max(q - m, eps))``, which this replaces, is constant at -log(eps), 18.42 for 1e-8, wherever q < m.

    Args:
        logits: (..., C).
        labels: (...,) class indices; ``teacher_argmax(teacher)`` where there is no truth.
        margin: in logits, not negative.
        options: of ``kd_loss`` but ``group``, as ``row_weight``, ``ignore_index``, ``shift`` and ``num_items``.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    _check(logits, labels, margin)
    checks.check_whole("margin_ce", options)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    own = labels.roll(-1, -1) if options.get("shift") else labels  # the last position's does not count
    lowered = torch.where(_at_label(logits, own), logits - margin, logits)
    return kd_loss(lowered, lowered.detach(), labels, kd_weight=0.0, ce_weight=1.0, **options)


def pairwise_hinge(
    logits: Tensor,
    labels: Tensor,
    margin: float = 1.0,
    *,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """sum over j != y of max(0, m - (z_y - z_j)) (Crammer & Singer 2001; Weston & Watkins 1999 for the sum)::

        C * F.multi_margin_loss(logits, labels, margin=margin)

    Each violated pair has the gradient -1 at the label and +1 at j, however far it is violated; a satisfied one none.
    Unlike PyTorch's, a NaN logit makes its row NaN. The other arguments are ``kd_loss``'s.

    Args:
        logits: (..., C). A masked column, ``-inf``, violates nothing.
        labels: (...,) class indices; one out of range makes its row NaN.
        margin: in logits, not negative.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    _check(logits, labels, margin)
    rows = CountedRows(
        logits, labels, row_weight=row_weight, ignore_index=ignore_index, reduction=reduction, num_items=num_items
    )
    z = rows.student
    assert rows.labels is not None
    target = _at_label(z, rows.labels)
    z_y = torch.where(target, z, 0.0).sum(-1, keepdim=True)
    others = ~target & (z != -math.inf)
    hinge = torch.where(others, (margin - z_y + z).relu(), 0.0).sum(-1)
    return rows.reduce(torch.where(target.any(-1), hinge, math.nan))


def _check(logits: Tensor, labels: Tensor, margin: float) -> None:
    check_logits("logits", logits)
    checks.check_labels(labels, logits, "a margin")
    if labels.is_floating_point():
        raise TypeError(f"labels must be class indices for a margin, got {labels.dtype} probabilities")
    check_number("margin", margin, least=0.0)


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., C) bool: the label's column. None in a row whose label is out of range, or ignored."""
    return labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
