"""``Step``: what a loss is computed from, and what makes one of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from kdfast.models import logits_of

__all__ = ["Objective", "Step", "SupportsForward"]


@dataclass(frozen=True)
class Step:
    """One micro-batch of a training step: what student and teacher say of it.

    Attributes:
        student: the student's output, as its forward returned it.
        teacher: the teacher's: its output, or the cache's labels; a tuple of these where there are several; None
            without a teacher. It has no gradient.
        labels: class indices, as ``kd_loss`` takes them; None without.
        batch: as the loader gave it, on the student's device.
        epoch: of the loader, from 0.
        progress: which share of all optimiser steps is done, in [0, 1).
    """

    student: Any
    teacher: Any = None
    labels: Tensor | None = None
    batch: Any = None
    epoch: int = 0
    progress: float = 0.0

    @property
    def logits(self) -> Tensor:
        """The student's. Raises ``TypeError`` where its output has none."""
        return logits_of(self.student)  # type: ignore[no-any-return]


# A scalar: the mean over the rows that count. An ``nn.Module`` with parameters of its own is trained along.
Objective = Callable[[Step], Tensor]


class SupportsForward(Protocol):
    """What makes a ``Step`` of a batch, as ``Distiller`` does."""

    student: nn.Module
    objective: Objective

    def forward(self, batch: Any, *, strict: bool = True) -> Step: ...
