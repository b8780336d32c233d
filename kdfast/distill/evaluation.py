"""A student's measures on a loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.distill.counting import Counting
from kdfast.distill.metrics import Metrics, is_function
from kdfast.distill.step import Step
from kdfast.labels import SoftLabels, Weights
from kdfast.models import evaluating, logits_of
from kdfast.objectives.teacher_argmax import teacher_argmax

if TYPE_CHECKING:
    from kdfast.distill.distiller import Distiller

__all__ = ["evaluate"]


def evaluate(distiller: Distiller, loader: Iterable[Any], metrics: Any = None) -> dict[str, float]:
    """Every metric over all rows of a loader that count, in evaluation mode and without gradients.

    Each part of the student has its own mode back afterwards, whatever has happened.

    Args:
        distiller: whose student, and whose teacher for the agreement, where it knows the loader's records.
        loader: of batches as ``fit`` takes them.
        metrics: as ``Metrics`` takes them, or a function (distiller, loader) of one's own giving numbers by name.

    Raises:
        ValueError: the loader is empty.
    """
    with evaluating(distiller.student), torch.no_grad():
        if is_function(metrics):
            return {name: float(value) for name, value in metrics(distiller, loader).items()}
        found = Metrics(metrics)
        counting = Counting.of(distiller.objective)
        empty = True
        for batch in loader:
            _count(found, distiller.forward(batch, strict=False), counting)
            empty = False
    if empty:
        raise ValueError("the evaluation's loader is empty")
    return found.compute()


def _count(metrics: Metrics, step: Step, counting: Counting) -> None:
    logits = step.logits
    rows, classes = logits.shape[:-1], logits.shape[-1]
    labels = step.labels
    if labels is not None:
        labels = counting.labels(labels.argmax(-1) if labels.is_floating_point() else labels)
        if labels.shape != rows:
            raise ValueError(f"labels must be {tuple(rows)} for this student, got {tuple(labels.shape)}")
    counted = counting.of_step(step)
    labels = None if labels is None else labels[counted]
    said = _likeliest(step.teacher) if metrics.need_teacher else None
    if said is not None:
        known = said.view(rows) >= 0
        metrics.update(logits[counted & known].view(-1, classes), None, said.view(rows)[counted & known])
    metrics.update(logits[counted], labels, None)


def _likeliest(teacher: Any) -> Tensor | None:
    """The classes that a single teacher has said, -1 where it says nothing; None where it has none to say."""
    if teacher is None or isinstance(teacher, tuple):
        return None
    said = teacher.unpack() if isinstance(teacher, PackedLabels) else teacher
    if isinstance(said, Weights):
        return None
    return teacher_argmax(said if isinstance(said, SoftLabels) else logits_of(said), ignore_index=-1)
