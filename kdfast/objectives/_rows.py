"""Logits as rows, under ``kd_loss``'s rules of which count and what a mean divides by, for losses in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.labels import Head, SoftLabels
from kdfast.labels.packed import Packed, unpacked
from kdfast.loss import checks
from kdfast.loss.first_look import look_closely, look_once
from kdfast.loss.label_values import check_label_values
from kdfast.loss.row_layout import RowLayout
from kdfast.models import check_logits

__all__ = ["CountedRows", "PairedRows", "Teacher", "check_classes", "whole_rows"]

Teacher = Tensor | SoftLabels | Packed


def whole_rows(student: Tensor | Head, teacher: Teacher) -> Tensor | SoftLabels:
    """A teacher's logits, or dense labels, with a row for each of the student's and its classes.

    Raises:
        TypeError, ValueError: something else, labels that do not hold whole rows, or a teacher that requires grad.
    """
    teacher = unpacked(teacher)
    rows = teacher.to_dense() if isinstance(teacher, SoftLabels) else check_logits("teacher", teacher)
    checks.check_teacher(checks.check_student(student), rows, student.shape[:-1].numel())
    check_classes(student, rows.vocab_size if isinstance(rows, SoftLabels) else rows.shape[-1])
    look_once(student, rows)
    if checks.values_are_checked():
        look_closely(student, rows)
    return rows


def check_classes(student: Tensor | Head, classes: int) -> None:
    """Raise ``ValueError`` unless the teacher has as many classes as the student, ``classes``."""
    if classes != student.shape[-1]:
        raise ValueError(f"student has {student.shape[-1]} classes, teacher {classes}: they must agree")


class CountedRows:
    """The rows of (..., C) logits. ``student`` is (rows, C), float32 at least, and 0 in rows that do not count.

    Those get an exactly zero gradient that way, whatever they hold.
    """

    def __init__(
        self,
        student: Tensor,
        labels: Tensor | None,
        *,
        row_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        num_items: int | Tensor | None = None,
        teacher: Tensor | SoftLabels | None = None,
    ) -> None:
        check_logits("student", student)
        checks.check_labels(labels, student, None)
        if labels is not None and labels.is_floating_point():
            raise TypeError(f"labels must be class indices here, got {labels.dtype} probabilities")
        checks.check_backward("recompute", reduction, num_items, student)
        checks.check_options(ignore_index)
        checks.check_numbers(1.0, 1.0, 1.0, 1.0, 1.0, row_weight)
        self._rows = RowLayout(student, shift=False)
        self._reduction = reduction
        self.labels = None if labels is None else self._rows.labels(labels)
        target = student if teacher is None else teacher
        self.counted = self._rows.counted(self.labels, ignore_index, row_weight, target)
        self._weight = self._rows.weights(self.counted, row_weight, reduction, num_items)
        used = teacher is None  # else labels only say which rows are ignored
        check_label_values(self.labels, None, self._weight, student.shape[-1], ignore_index, used=used)
        if checks.values_are_checked():
            checks.check_values(student, target, [], student.shape[-1])
        self.student = self.select(student)

    def select(self, x: Tensor) -> Tensor:
        """(rows, C) of (..., C) numbers, 0 in rows that do not count."""
        rows = x.reshape(self.counted.numel(), x.shape[-1]).to(self._rows.dtype)
        return torch.where(self.counted[:, None], rows, 0.0)

    def reduce(self, values: Tensor) -> Tensor:
        """The loss of (rows,) values: weighted, and reduced as ``kd_loss`` does."""
        loss = torch.where(self.counted, values * self._weight, 0.0)
        return self._rows.unflatten(loss) if self._reduction == "none" else loss.sum()


class PairedRows(CountedRows):
    """The rows of a student's (..., C) logits beside a teacher's whole rows: logits, or dense or hidden labels.

    ``student_log_probs`` and ``teacher_log_probs`` are (rows, C) log-probabilities at ``temperature``.

    Raises:
        ValueError: other labels, another number of rows or classes, or a teacher that requires grad.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Teacher,
        labels: Tensor | None,
        *,
        temperature: float | Tensor = 1.0,
        row_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        num_items: int | Tensor | None = None,
    ) -> None:
        check_logits("student", student)
        checks.check_numbers(temperature, 1.0, 1.0, 1.0, 1.0, row_weight)
        teacher = whole_rows(student, teacher)
        logits = teacher.values if isinstance(teacher, SoftLabels) else teacher
        super().__init__(
            student,
            labels,
            row_weight=row_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items=num_items,
            teacher=teacher,
        )
        tau = self._rows.number("temperature", temperature)
        tau = torch.where(self.counted, tau, 1.0)[:, None] if isinstance(tau, Tensor) else tau
        self.student_log_probs = (self.student / tau).log_softmax(-1)
        self.teacher_log_probs = (self.select(logits) / tau).log_softmax(-1)
