"""Classes that weigh more than others."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kdfast.labels import Head, SoftLabels, Weights
from kdfast.labels.packed import unpacked
from kdfast.loss import checks
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._rows import Teacher, check_classes, whole_rows

__all__ = ["class_weighted_ce"]


def class_weighted_ce(
    student: Tensor | Head,
    teacher: Teacher,
    class_weight: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Any:
    """Soft cross-entropy with a weight per class, -sum_c w_c p_c log q_c::

        -(class_weight * teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()

    The same gradient as sum_c w_c p_c log(p_c / q_c): (sum_c w_c p_c) q - w o p. The weights are the terms', and not
    normalised. An article multiplies the student's probabilities instead, which then are no distribution.

    Args:
        student: (..., C) logits, or a ``Head``.
        teacher: (..., C) logits, or soft labels of kind dense, hidden or weights.
        class_weight: (C,) or, one set per row, (..., C). Not negative; 0 takes a class out.
        labels: only for ``ignore_index`` and ``ce_weight``.
        temperature: of both sides.
        options: the others of ``kd_loss``, but ``divergence``, ``teacher_temperature``, ``kd_weight`` and ``group``.

    Raises:
        TypeError, ValueError: bad arguments, numbers of classes that differ, or labels with a tail: which classes it
            holds, and so what it weighs, is not known.
    """
    _check_weight(class_weight, student)
    checks.check_whole("class_weighted_ce", options)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number for class weights, got {type(temperature).__name__}")
    checks.check_numbers(temperature, temperature, 1.0, 1.0, 1.0, None)
    teacher = unpacked(teacher)
    soft_ce: dict[str, Any] = {"divergence": "soft_ce", "temperature": temperature}
    if isinstance(teacher, Weights):
        check_classes(student, teacher.vocab_size)
        return kd_loss(student, _weigh_entries(teacher, class_weight), labels, **soft_ce, **options)
    weighted, mass = _weigh_rows(whole_rows(student, teacher), class_weight, temperature)
    mass = mass.view(student.shape[:-1])
    return kd_loss(student, weighted, labels, teacher_temperature=1.0, kd_weight=mass, **soft_ce, **options)


def _check_weight(weight: object, student: Tensor | Head) -> None:
    shape = checks.check_student(student).shape
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.layout != torch.strided:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"class_weight must be a floating-point tensor, got {got}")
    if weight.shape not in (shape, shape[-1:]):
        raise ValueError(f"class_weight must be {tuple(shape[-1:])} or {tuple(shape)}, got {tuple(weight.shape)}")
    if weight.device != student.device:
        raise ValueError(f"student is on {student.device}, class_weight on {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("class_weight requires grad, but kd_loss differentiates with respect to the student only")
    if checks.values_are_checked() and not bool(((weight >= 0) & (weight < math.inf)).all()):
        raise ValueError(
            f"class_weight must be finite and not negative, got {float(weight.min())} to {float(weight.max())}"
        )


def _weigh_rows(teacher: Tensor | SoftLabels, weight: Tensor, temperature: float) -> tuple[Tensor | SoftLabels, Tensor]:
    """The logits of the distribution that w o p is proportional to, and each row's sum of w o p."""
    logits = teacher.values if isinstance(teacher, SoftLabels) else teacher
    tempered = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    weighted = tempered + (weight if weight.dim() == 1 else weight.reshape(logits.shape)).log()
    mass = (weighted.logsumexp(-1) - tempered.logsumexp(-1)).exp()
    return replace(teacher, values=weighted) if isinstance(teacher, SoftLabels) else weighted, mass


def _weigh_entries(labels: Weights, weight: Tensor) -> Weights:
    weight = weight.float()
    if weight.dim() == 1:
        return replace(labels, values=labels.values * weight[labels.ids])
    rows = weight.reshape(-1, labels.vocab_size)
    return replace(labels, values=labels.values * rows[labels.entry_rows, labels.ids])
