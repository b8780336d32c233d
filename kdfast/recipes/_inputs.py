"""What recipes are given, checked and brought to one form: a step's teachers and rows, and tensors of one shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.read.packed import PackedLabels
from kdfast.distill.counting import counted_rows
from kdfast.distill.step import Step
from kdfast.labels import SoftLabels
from kdfast.models import logits_of

__all__ = [
    "answers_of",
    "counted_rows",
    "decoded",
    "dense_logits",
    "require_alike",
    "require_mask",
    "several_teachers",
    "soft_labels",
    "wide",
]

IGNORE = -100


# ---- a step ---------------------------------------------------------------------------------------------------------


def answers_of(step: Step) -> Any:
    """The one teacher's. Raises ``ValueError`` where there is none, or several."""
    if step.teacher is None:
        raise ValueError("this objective needs a teacher, got a step without one")
    if isinstance(step.teacher, tuple):
        raise ValueError(f"this objective takes one teacher, got {len(step.teacher)}: an ensemble's takes several")
    return step.teacher


def several_teachers(step: Step) -> tuple[Any, ...]:
    """Raises ``ValueError`` unless there are two or more."""
    if not isinstance(step.teacher, tuple) or len(step.teacher) < 2:
        got = len(step.teacher) if isinstance(step.teacher, tuple) else int(step.teacher is not None)
        raise ValueError(f"an ensemble needs two teachers or more, got {got}: Distiller(student, [teacher, ...])")
    return step.teacher


def decoded(step: Step) -> Step:
    """The step with a cache's labels unpacked, once for all who look at them."""
    said = tuple(x.unpack() if isinstance(x, PackedLabels) else x for x in _each(step.teacher))
    return replace(step, teacher=said if isinstance(step.teacher, tuple) else said[0])


def soft_labels(answers: Any) -> SoftLabels | None:
    """A cache's labels, decoded; None where a teacher's logits are at hand."""
    if isinstance(answers, PackedLabels):
        return answers.unpack()
    return answers if isinstance(answers, SoftLabels) else None


def dense_logits(answers: Any, like: Tensor) -> Tensor:
    """(..., vocabulary) logits of a teacher's output or labels, with the leading dimensions of ``like``.

    Raises:
        ValueError: the labels do not hold whole rows, or logits require grad.
    """
    labels = soft_labels(answers)
    if labels is not None:
        return labels.to_dense().values.reshape(*like.shape[:-1], -1)
    logits = logits_of(answers)
    if logits.requires_grad:
        raise ValueError("teacher requires grad, but only the student is trained: compute it under torch.no_grad()")
    return logits


def wide(x: Tensor) -> Tensor:
    """float32 of narrower types, for a softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _each(teacher: Any) -> tuple[Any, ...]:
    return teacher if isinstance(teacher, tuple) else (teacher,)


# ---- tensors of one shape -------------------------------------------------------------------------------------------


def require_alike(frozen: str, /, **tensors: Tensor) -> None:
    """Floating-point tensors of one shape, of which the one named ``frozen``, the teacher's, has no gradient.

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
    if tensors[frozen].requires_grad:
        raise ValueError(f"{frozen} requires grad, but only the student is trained: compute it under torch.no_grad()")


def require_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """A bool tensor of ``shape``. Raises ``ValueError`` otherwise."""
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{name} must be a bool tensor of {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}")
