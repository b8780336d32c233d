"""Hard-example mining: row weights from the rows' own losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.counting import Counting
from kdfast.distill.objective import teacher_of
from kdfast.distill.step import Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.recipes._rows import IGNORE, counted_rows, wide

__all__ = ["focal", "hardest", "row_losses"]


def hardest(
    share: float, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Callable[[Step], Tensor]:
    """The share of the batch's rows with the largest loss, as a mask: ``KD(row_weight=hardest(0.5))``.

    The others leave the denominator, so the loss is the mean over the hard rows (OHEM, Shrivastava et al. 2016). A
    share of a row counts as a row; between equal losses the earlier row is taken.

    Args:
        share: in (0, 1], of the rows that count.
        by, temperature, shift, ignore_index: which loss is meant, as ``row_losses`` takes them.

    Raises:
        ValueError: a share out of its range, or an unknown loss.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    _check(by)

    def weights(step: Step) -> Tensor:
        counted = counted_rows(step, shift=shift, ignore_index=ignore_index).flatten()
        losses = row_losses(step, by=by, temperature=temperature, shift=shift, ignore_index=ignore_index).flatten()
        rank = losses.masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True).argsort()
        # A share such as .3 of 10 rows is 3.0000000000000004 in floating point.
        return (counted & (rank < (counted.sum() * share - 1e-6).ceil())).view(step.logits.shape[:-1])

    return weights


def focal(
    gamma: float, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Callable[[Step], Tensor]:
    """``(1 - exp(-loss))^gamma`` of every row: ``KD(row_weight=focal(2.0))``.

    Of cross-entropy this is ``(1 - q_y)^gamma``, the focal loss (Lin et al. 2017), but that the weight is held constant
    and has no gradient. The denominator stays.

    Args:
        gamma: not negative; 0 weighs all rows alike.
        by, temperature, shift, ignore_index: which loss is meant, as ``row_losses`` takes them.

    Raises:
        ValueError: a negative gamma, or an unknown loss.
    """
    if not gamma >= 0.0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    _check(by)

    def weights(step: Step) -> Tensor:
        losses = row_losses(step, by=by, temperature=temperature, shift=shift, ignore_index=ignore_index)
        return (-torch.expm1(-losses)).clamp(min=0.0) ** gamma

    return weights


@torch.no_grad()
def row_losses(
    step: Step, *, by: str = "ce", temperature: float = 1.0, shift: bool = False, ignore_index: int = IGNORE
) -> Tensor:
    """(...) losses of the student's rows, in nats: a row that does not count has 0.

    Args:
        step: what student and teacher say.
        by: "ce", cross-entropy on the labels, or "kd", KL(teacher || student).
        temperature: of "kd"; the divergence is not scaled by its square.
        shift: position i is judged by label i + 1, as ``KD(shift=True)`` does.
        ignore_index: of rows that do not count: ``KD``'s, where it has another than -100.

    Raises:
        ValueError: labels or a teacher that ``by`` needs are not there.
    """
    _check(by)
    counted = counted_rows(step, shift=shift, ignore_index=ignore_index)
    if by == "kd":
        return kd_loss(  # type: ignore[no-any-return]
            step.logits,
            teacher_of(step),
            temperature=temperature,
            scale_by_t2=False,
            row_weight=counted,
            reduction="none",
        )
    if step.labels is None:
        raise ValueError('by="ce" needs labels, got a step without them: use by="kd"')
    labels = step.labels
    if labels.is_floating_point():
        labels = (labels.roll(-1, -2) if shift else labels).flatten(0, -2)
    else:
        labels = Counting(ignore_index, shift).labels(labels).flatten().long()
    rows = F.cross_entropy(wide(step.logits.flatten(0, -2)), labels, ignore_index=ignore_index, reduction="none")
    return torch.where(counted, rows.view(counted.shape), 0.0)


def _check(by: str) -> None:
    if by not in ("ce", "kd"):
        raise ValueError(f'by must be "ce" or "kd", got {by!r}')
