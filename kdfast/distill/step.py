"""``Step``: what an objective computes its loss from, and the protocol of what makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from kdfast.models import logits_of

__all__ = ["Objective", "Step", "SupportsForward"]


@dataclass(frozen=True)
class Step:
    """The outputs of student and teacher for one batch, from which an objective computes its loss.

    Attributes:
        student: the student's output, as its forward returned it.
        teacher: the teacher's output, or labels from a cache; a tuple of these for several teachers; None without a
            teacher. It has no gradient.
        labels: class indices (...) or probabilities (..., classes), as ``kd_loss`` takes them; None without labels.
        batch: the loader's batch, on the student's device.
        epoch: the epoch under way, from 0.
        progress: the share of all optimiser steps that is done, in [0, 1).
        mask: which mask of the batch goes with the student's rows, as ``Distiller`` takes it.
    """

    student: Any
    teacher: Any = None
    labels: Tensor | None = None
    batch: Any = None
    epoch: int = 0
    progress: float = 0.0
    mask: str | Callable[[Any], Any] | None = None

    @property
    def logits(self) -> Tensor:
        """The student's logits, (..., classes). Raises ``TypeError`` if its output has none."""
        return logits_of(self.student, "the student")  # type: ignore[no-any-return]


# Returns a scalar: the mean over the rows that count. Parameters of an ``nn.Module`` are trained with the student's.
Objective = Callable[[Step], Tensor]


class SupportsForward(Protocol):
    """An object that runs student and teacher on a batch: the part of ``Distiller`` that evaluation uses."""

    student: nn.Module
    objective: Objective

    def forward(self, batch: Any, *, strict: bool = True) -> Step:
        """Run student and teacher on a batch."""
        ...
