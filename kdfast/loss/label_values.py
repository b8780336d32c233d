"""Labels that no class has, and rows of class probabilities that are no distribution, found where they are at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import can_look, values_are_checked

__all__ = ["check_distributions", "check_label_values"]

_FEW = 2**8  # of so many indices a list is made sooner than PyTorch reduces them
_SOME = 2**16  # of a batch's class probabilities so many are looked at in every call
_ROUNDING = 2e-2  # of a sum of bfloat16 numbers


def check_label_values(
    index: Tensor | None,
    probs: Tensor | None,
    weight: Tensor,
    columns: int,
    ignore_index: int,
    *,
    used: bool,
) -> None:
    """Raise ``ValueError`` for wrong labels of rows that weigh something, where looking waits for nothing.

    KDFAST_CHECK=1 looks at labels on any device, and at every row of class probabilities.

    Args:
        index: (rows,) class indices, or None.
        probs: (..., V) class probabilities, or None.
        weight: (rows,).
        columns: number of classes.
        ignore_index: for the message.
        used: whether labels are more than a mark of the rows that count. If not, of class indices only negative ones
            are refused: their rows would count although they are marked.
    """
    values = index if index is not None else probs if used else None
    if values is None or not values.numel() or not (can_look(values) or values_are_checked()):
        return
    if index is not None:
        _check_index(index, weight, columns, ignore_index, used)
    else:
        step = 1 if values_are_checked() else -(-values.numel() // _SOME)
        check_distributions(values.reshape(weight.numel(), -1)[::step], weight[::step] != 0.0)


def _check_index(index: Tensor, weight: Tensor, columns: int, ignore_index: int, used: bool) -> None:
    low, high = _ends(index)
    if low >= 0 and high < columns:
        return
    index = index[weight != 0.0]
    wrong = index[(index < 0) | (index >= columns)] if used else index[index < 0]
    if wrong.numel():
        raise ValueError(
            f"labels must be in [0, {columns}) or ignore_index {ignore_index}, got {int(wrong[0])} among values from "
            f"{int(index.min())} to {int(index.max())}"
        )


def _ends(index: Tensor) -> tuple[int, int]:
    """The least and the greatest."""
    if index.numel() <= _FEW:
        few = index.tolist()
        return min(few), max(few)
    low, high = torch.aminmax(index)
    return int(low), int(high)


def check_distributions(rows: Tensor, counted: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless each row is class probabilities, or all zero where there is no label.

    Args:
        rows: (rows, V). Looking at them waits for their device.
        counted: (rows,) bool, which rows are looked at; None: all.
    """
    rows = rows.float()
    low, total = rows.amin(-1), rows.sum(-1)
    wrong = ~(((low >= 0.0) & ((total - 1.0).abs() < _ROUNDING)) | (rows == 0.0).all(-1))
    wrong = wrong if counted is None else wrong & counted
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels as class probabilities must be rows that sum to 1, got a sum of {float(total[row]):.4g} and "
            f"values down to {float(low[row]):.4g}. Of a truncated row give probs / probs.sum(-1, keepdim=True), of a "
            "weight row_weight; several labels at once are a binary problem per class, "
            "torch.stack((torch.zeros_like(z), z), -1) of each logit z"
        )
