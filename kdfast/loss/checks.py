"""Argument checks: a named error that says what was passed and what was wanted, before any kernel runs."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from kdfast.labels import Head, Prototype, Ragged, SoftLabels
from kdfast.models import check_logits, check_plain

__all__ = [
    "check_backward",
    "check_eager",
    "check_labels",
    "check_numbers",
    "check_smoothing",
    "check_student",
    "check_teacher",
    "check_values",
    "look_like_probabilities",
    "values_are_checked",
]

Number = float | Tensor


def values_are_checked() -> bool:
    """Whether KDFAST_CHECK=1 asks for checks of the values inside tensors, which wait for the device."""
    return os.environ.get("KDFAST_CHECK", "") == "1"


def check_student(student: object) -> Tensor | Head:
    """``student``. Raise ``TypeError`` or ``ValueError`` unless it is logits or a ``Head``."""
    return student if isinstance(student, Head) else check_logits("student", student)


def check_teacher(student: Tensor | Head, teacher: Tensor | Head | SoftLabels, rows: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the teacher fits the student's ``rows`` rows and is not trained."""
    if isinstance(teacher, SoftLabels):
        if len(teacher) != rows:
            raise ValueError(
                f"teacher has {len(teacher)} rows of soft labels, student {tuple(student.shape)} has {rows}"
            )
        given = [x for x in vars(teacher).values() if isinstance(x, Tensor)]
    else:
        logits = teacher if isinstance(teacher, Head) else check_logits("teacher", teacher)
        given = [logits.hidden if isinstance(logits, Head) else logits]
        if logits.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"student and teacher must have the same leading dimensions, got {tuple(student.shape)} and "
                f"{tuple(logits.shape)}"
            )
    if any(x.requires_grad for x in given):
        raise ValueError("teacher requires grad, but only the student is trained: compute it under torch.no_grad()")
    if teacher.device != student.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")


def check_labels(labels: Tensor | None, student: Tensor | Head, needed_by: str | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless labels fit the student; without any, if something needs them."""
    if labels is None:
        if needed_by is not None:
            raise ValueError(f"labels are required by {needed_by}")
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of class indices or probabilities, got {type(labels).__name__}")
    check_plain("labels", labels)
    if labels.device != student.device:
        raise ValueError(f"student is on {student.device}, labels on {labels.device}")
    if labels.is_floating_point():
        if labels.shape != student.shape:
            raise ValueError(
                f"labels as class probabilities must have the student's shape {tuple(student.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        if labels.requires_grad:
            raise ValueError("labels require grad, but only the student is trained")
        if needed_by == "divergence dkd":
            raise ValueError("divergence dkd needs class indices as labels, got class probabilities")
    elif labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 class indices or floating-point probabilities, got {labels.dtype}")
    elif labels.shape != student.shape[:-1]:
        raise ValueError(f"labels must be {tuple(student.shape[:-1])} for this student, got {tuple(labels.shape)}")


def check_numbers(
    temperature: object,
    teacher_temperature: object,
    kd_weight: object,
    ce_weight: object,
    z_weight: object,
    row_weight: object,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless temperatures are positive and weights finite.

    ``row_weight`` is a tensor or None; the others may be tensors, whose values are not looked at.
    """
    _check_positive("temperature", temperature)
    _check_positive("teacher_temperature", teacher_temperature)
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight), ("z_weight", z_weight)):
        _check_number(name, value)
        if isinstance(value, int | float) and not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if row_weight is not None:
        if not isinstance(row_weight, Tensor):
            raise TypeError(f"row_weight must be a tensor of one weight per row, got {type(row_weight).__name__}")
        _check_number("row_weight", row_weight)


def _check_positive(name: str, value: object) -> None:
    _check_number(name, value)
    if isinstance(value, int | float) and not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        check_plain(name, value)
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but kd_loss differentiates with respect to the student only")
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a tensor of one number per row, got {type(value).__name__}")


def check_smoothing(value: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a label smoothing is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"label_smoothing must be a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {value}")


def check_backward(backward: str, reduction: str, num_items: object, student: Tensor | Head) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a backward mode, a reduction or a ``num_items`` that do not fit."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if backward not in ("fused", "recompute", "inplace", "eager"):
        raise ValueError(f'backward must be "fused", "recompute", "inplace" or "eager", got {backward!r}')
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f'num_items replaces the denominator of reduction="mean", got reduction={reduction!r}')
        _check_positive("num_items", num_items)
    if backward == "inplace":
        if isinstance(student, Head):
            raise ValueError('backward="inplace" writes over logits, which a Head does not have: use "fused"')
        _check_inplace(reduction, student)


def check_eager(backward: str, student: Tensor | Head, in_group: bool) -> str:
    """``"eager"``. Raise ``ValueError`` for what it does not serve; ``backward`` is what was asked for."""
    why = 'backward="eager"' if backward == "eager" else 'torch.func and forward mode, which need backward="eager",'
    if in_group:
        raise ValueError(f"{why} cannot be combined with group=: the derivatives of a shared vocabulary are not there")
    if backward == "inplace":
        raise ValueError(f'{why} cannot be combined with backward="inplace": logits would be overwritten')
    if isinstance(student, Head) and student.weight_grad is not None:
        raise ValueError(f"{why} cannot be combined with Head(weight_grad=): the weight's gradient is returned")
    return "eager"


def _check_inplace(reduction: str, student: Tensor) -> None:
    if reduction == "none":
        raise ValueError('backward="inplace" needs a scalar reduction: per-row upstream gradients are not known yet')
    base = student if student._base is None else student._base
    if base.requires_grad and base.is_leaf:
        raise ValueError('backward="inplace" would overwrite a leaf: pass logits that a model computed')
    if student.dtype == torch.float16:
        raise ValueError(
            'backward="inplace" rounds float16 gradients before GradScaler has scaled them; use "recompute"'
        )
    if not student.is_contiguous():
        raise ValueError(f'backward="inplace" needs contiguous logits, got strides {student.stride()}')


def check_values(
    student: Tensor | Head,
    teacher: Tensor | Head | SoftLabels,
    labels: Tensor | None,
    counted: Tensor,
    temperatures: list[Number],
    columns: int,
) -> None:
    """Raise ``ValueError`` for bad values: labels, temperatures, soft labels, and probabilities in logits' place."""
    for tau in temperatures:
        if isinstance(tau, Tensor) and not bool(((tau > 0) & (tau < math.inf)).all()):
            raise ValueError(f"temperatures must be positive and finite, got values down to {float(tau.min())}")
    if labels is not None and not labels.is_floating_point():
        used = labels.reshape(-1)[counted]
        if bool(((used < 0) | (used >= columns)).any()):
            raise ValueError(
                f"labels must be in [0, {columns}) or ignore_index, got values from {int(used.min())} to "
                f"{int(used.max())}"
            )
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, Tensor) and look_like_probabilities(x.detach()):
            raise ValueError(f"{name} holds probabilities (rows in [0, 1] that sum to 1); kd_loss takes logits")
    if isinstance(teacher, Ragged):
        _check_entries(teacher, columns)


def look_like_probabilities(x: Tensor) -> bool:
    """Whether all rows lie in [0, 1] and sum to 1, as logits hardly ever do."""
    if x.numel() == 0 or x.shape[-1] < 2:
        return False
    inside = bool(((x >= 0) & (x <= 1)).all())
    return inside and bool(((x.float().sum(-1) - 1.0).abs() < 1e-2).all())


def _check_entries(labels: Ragged, columns: int) -> None:
    ids = labels.ids
    if bool(((ids < 0) | (ids >= min(columns, labels.vocab_size))).any()):
        raise ValueError(
            f"soft labels must name tokens in [0, {min(columns, labels.vocab_size)}), got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    if isinstance(labels, Prototype):
        _check_prototypes(labels.prototype_ids, labels.prototypes)
    if torch.unique(labels.entry_rows * labels.vocab_size + ids).numel() != ids.numel():
        raise ValueError("soft labels must name a token once per row, got a token twice")


def _check_prototypes(prototype_ids: Tensor, prototypes: Tensor) -> None:
    if bool(((prototype_ids < 0) | (prototype_ids >= len(prototypes))).any()):
        raise ValueError(
            f"soft labels must name prototypes in [0, {len(prototypes)}), got {int(prototype_ids.min())} to "
            f"{int(prototype_ids.max())}"
        )
    if not bool(((prototypes >= 0) & (prototypes < math.inf)).all()):
        raise ValueError(
            f"prototypes must be finite and not negative, got {float(prototypes.min())} to {float(prototypes.max())}"
        )
