"""The teacher's likeliest class as a hard label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.labels import Head, SoftLabels, Weights
from kdfast.labels.packed import unpacked
from kdfast.loss import checks
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._rows import Teacher

__all__ = ["teacher_argmax", "teacher_argmax_ce"]


def teacher_argmax(teacher: Teacher, ignore_index: int = -100) -> Tensor:
    """The teacher's likeliest class of each row, int64: ``teacher.argmax(-1)``.

    ``kd_loss(student, teacher, teacher_argmax(teacher), ce_weight=0.5)`` has both kinds of its labels in one sweep.

    Args:
        teacher: (..., C) logits or probabilities; or soft labels of R rows, for (R,) classes. Of top-k and prototype
            labels it is the likeliest entry: they hold the k likeliest classes.
        ignore_index: the class of rows that say nothing: absent ones, and top-k rows without an entry.

    Raises:
        TypeError: something else.
        ValueError: labels of kind weights: the likeliest of a sampler's draws need not be the likeliest class.
    """
    checks.check_options(ignore_index)
    if isinstance(teacher, Tensor):
        if (
            not teacher.is_floating_point()
            or teacher.layout != torch.strided
            or teacher.dim() < 1
            or teacher.shape[-1] < 1
        ):
            raise TypeError(f"teacher must be (..., C) logits, got {teacher.dtype} {tuple(teacher.shape)}")
        return teacher.detach().argmax(-1)
    teacher = unpacked(teacher)
    if not isinstance(teacher, SoftLabels):
        raise TypeError(f"teacher must be a tensor of logits or soft labels, got {type(teacher).__name__}")
    classes = teacher.argmax()
    classes = classes.masked_fill(classes < 0, ignore_index)
    return classes if teacher.present is None else classes.masked_fill(~teacher.present, ignore_index)


def teacher_argmax_ce(student: Tensor | Head, teacher: Teacher, labels: Tensor | None = None, **options: Any) -> Any:
    """-log q_c at the teacher's likeliest class c: ``F.cross_entropy(student, teacher.argmax(-1))``.

    One article has -log max(q) in its place, which rewards the student for being sure of anything; another
    -sum max(q) log p, which has student and teacher swapped.

    Args:
        student: (..., C) logits, or a ``Head``.
        teacher: as ``teacher_argmax`` takes it, with a row for each of the student's.
        labels: only for ``ignore_index``.
        options: of ``kd_loss``, but ``divergence``, ``teacher_temperature`` and ``group``.

    Raises:
        TypeError, ValueError: as ``teacher_argmax`` and ``kd_loss``.
    """
    checks.check_whole("teacher_argmax_ce", options)
    columns = checks.check_student(student).shape[-1]
    classes = teacher_argmax(teacher, ignore_index=-1).reshape(-1)
    # Made without a look at the classes: one that the student lacks makes its row NaN.
    hard = Weights(
        vocab_size=columns,
        values=torch.ones_like(classes, dtype=torch.float32),
        ids=classes.clamp(min=0).int(),
        offsets=torch.arange(len(classes) + 1, device=classes.device),
        present=classes >= 0,
    )
    return kd_loss(student, hard, labels, divergence="soft_ce", teacher_temperature=1.0, **options)
