"""What recipes are given, checked and brought to one form: a step's teachers, and tensors of one shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdfast.distill.counting import counted_rows
from kdfast.distill.objective import teacher_of
from kdfast.distill.step import Step
from kdfast.labels import SoftLabels
from kdfast.labels.packed import unpacked
from kdfast.models import logits_of
from kdfast.objectives._vectors import widened

__all__ = [
    "IGNORE",
    "check_same_shape",
    "counted_logits",
    "counted_rows",
    "dense_logits",
    "several_teachers",
    "soft_labels",
    "teacher_logits",
    "teacher_output",
    "teacher_target",
    "unpacked_teachers",
    "widened",
]

IGNORE = -100


# ---- a step ---------------------------------------------------------------------------------------------------------


def teacher_output(step: Step) -> Any:
    """The output of the step's only teacher, or the labels that a cache has for it.

    Raises:
        ValueError: the step has no teacher, or several.
    """
    if step.teacher is None:
        raise ValueError("this objective needs a teacher, got a step without one")
    if isinstance(step.teacher, tuple):
        raise ValueError(f"this objective takes one teacher, got {len(step.teacher)}: an ensemble's takes several")
    return step.teacher


def teacher_target(step: Step) -> Any:
    """The only teacher's logits or soft labels, as a loss takes them.

    Raises:
        ValueError: the step has no teacher, or several, or one of other classes than the student's.
    """
    teacher_output(step)
    return teacher_of(step)


def teacher_logits(step: Step) -> Tensor:
    """The only teacher's logits, (..., vocabulary), with the leading dimensions of the student's.

    Raises:
        ValueError: the step has no teacher, or several; its labels do not hold whole rows; its logits require grad.
    """
    return dense_logits(teacher_output(step), step.logits)


def counted_logits(step: Step) -> tuple[Tensor, Tensor]:
    """The student's and the only teacher's logits, (n, vocabulary), of the n rows that count."""
    counted = counted_rows(step)
    return step.logits[counted], teacher_logits(step)[counted]


def several_teachers(step: Step) -> tuple[Any, ...]:
    """The outputs or labels of the step's teachers. Raises ``ValueError`` unless there are two or more."""
    if not isinstance(step.teacher, tuple) or len(step.teacher) < 2:
        got = len(step.teacher) if isinstance(step.teacher, tuple) else int(step.teacher is not None)
        raise ValueError(f"an ensemble needs two teachers or more, got {got}: Distiller(student, [teacher, ...])")
    return step.teacher


def unpacked_teachers(step: Step) -> Step:
    """The step with a cache's labels unpacked, so that several objectives share the work."""
    if isinstance(step.teacher, tuple):
        return replace(step, teacher=tuple(map(unpacked, step.teacher)))
    return replace(step, teacher=unpacked(step.teacher))


def soft_labels(output: Any) -> SoftLabels | None:
    """Unpacked labels, where ``output`` is a cache's; None where it is a model's."""
    output = unpacked(output)
    return output if isinstance(output, SoftLabels) else None


def dense_logits(output: Any, like: Tensor) -> Tensor:
    """(..., vocabulary) logits of a teacher's output or labels, with the leading dimensions of ``like``.

    Raises:
        ValueError: the labels do not hold whole rows, or logits require grad.
    """
    labels = soft_labels(output)
    if labels is not None:
        return labels.to_dense().values.reshape(*like.shape[:-1], -1)
    logits: Tensor = logits_of(output)
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires grad, but only the student is trained: compute it under torch.no_grad()")
    return logits


# ---- tensors of one shape -------------------------------------------------------------------------------------------


def check_same_shape(frozen: str, /, **tensors: Tensor) -> None:
    """Check floating-point tensors of one shape, of which the one named ``frozen``, the teacher's, has no gradient.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: shapes differ, or the teacher's requires grad.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"all of these must have one shape, got {shapes}")
    if tensors[frozen].requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{frozen} requires grad, but only the student is trained: compute it under torch.no_grad()")
