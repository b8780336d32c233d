"""Adaptive distillation: the teacher's weight follows how far the student is behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from kdfast.distill.objective import KD
from kdfast.recipes._rounds import History, Rounds

__all__ = ["AdaptiveKD"]


class AdaptiveKD:
    """Rounds of distillation; after each the student is measured, and a weak one listens to its teacher more::

        gap = teacher_score - score of the student
        kd_weight = low + (high - low) * min(1, max(0, gap) / first gap),   ce_weight = 1 - kd_weight

    It stops when the gap is at most ``tolerance``. The first round has ``high``; the first gap, after it, is the scale,
    so the weights are the same for any measure. The article raises the weight of a weak student and never says by how
    much, or when it ends.

    Args:
        student, teacher: as ``Distiller`` takes them.
        teacher_score: the teacher's ``monitor`` on the data that the student is measured on. Not the test set's: the
            weights follow it.
        low, high: bounds of ``kd_weight``, in [0, 1].
        tolerance: the gap at which the student is good enough.
        monitor: a number of ``Distiller.fit``'s records that grows with quality.
        temperature: ``KD``'s.
        options: ``Distiller``'s.

    Attributes:
        kd_weights: of each round that was trained.
        gaps: after each of them.

    Raises:
        ValueError: bounds out of order.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        teacher_score: float,
        low: float = 0.1,
        high: float = 0.9,
        tolerance: float = 0.0,
        monitor: str = "accuracy",
        temperature: float = 2.0,
        **options: Any,
    ) -> None:
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"weights must be 0 <= low <= high <= 1, got low={low} and high={high}")
        self.teacher, self.teacher_score, self.monitor = teacher, teacher_score, monitor
        self.low, self.high, self.tolerance, self.temperature = low, high, tolerance, temperature
        self.kd_weights: list[float] = []
        self.gaps: list[float] = []
        self._rounds = Rounds(student, **options)

    def fit(
        self, loader: Iterable[Any], *, rounds: int, epochs: int, eval_loader: Iterable[Any], **plan: Any
    ) -> list[History]:
        """At most ``rounds`` of ``epochs`` each. Returns each round's history.

        Raises:
            ValueError: ``eval_loader``'s records have no ``monitor``.
        """
        histories: list[History] = []
        while len(histories) < rounds and not (self.gaps and self.gaps[-1] <= self.tolerance):
            self.kd_weights.append(self.next_weight())
            objective = KD(
                temperature=self.temperature, kd_weight=self.kd_weights[-1], ce_weight=1.0 - self.kd_weights[-1]
            )
            distiller = self._rounds.next(self.teacher, objective)
            histories.append(distiller.fit(loader, epochs=epochs, eval_loader=eval_loader, **plan))
            self.gaps.append(self._gap(histories[-1]))
        return histories

    def next_weight(self) -> float:
        """The next round's ``kd_weight``, by the gaps so far."""
        if not self.gaps:
            return self.high
        # A first gap of 0 or less is below every tolerance that one would continue with.
        share = max(0.0, self.gaps[-1]) / self.gaps[0] if self.gaps[0] > 0.0 else 0.0
        return self.low + (self.high - self.low) * min(1.0, share)

    def _gap(self, history: History) -> float:
        measured = [record[self.monitor] for record in history if self.monitor in record]
        if not measured:
            raise ValueError(
                f"no record has {self.monitor!r}, got {', '.join(history[-1]) if history else 'no record'}"
            )
        return self.teacher_score - float(measured[-1])
