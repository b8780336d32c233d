"""Several rounds of training: two models that teach each other in turn, and a weight that follows the gap."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kdfast.distill.distiller import Distiller
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective
from kdfast.recipes.weighting import hardest

__all__ = ["AdaptiveKD", "Bootstrap", "History", "Rounds", "check_options"]

History = list[dict[str, Any]]


class Rounds:
    """Distillers of one student. They share an optimizer, whose rate begins anew each round, as its schedule does.

    A ``folder`` has one per round inside, so a recipe that was stopped goes on in the round where it was.
    """

    def __init__(self, student: nn.Module, *, folder: str | Path | None = None, **options: Any) -> None:
        check_options(options)
        self.student, self._folder, self._options = student, folder, options
        self._count = 0

    def next(self, teacher: Any, objective: Objective) -> Distiller:
        """The distiller of the next round."""
        self._count += 1
        folder = None if self._folder is None else Path(self._folder) / f"round-{self._count}"
        distiller = Distiller(self.student, teacher, objective=objective, folder=folder, **self._options)
        self._options["optimizer"] = distiller.optimizer
        return distiller


def check_options(options: dict[str, Any]) -> None:
    """Raises ``TypeError`` for an optimizer that exists already: it is of one model, and there are several."""
    if isinstance(options.get("optimizer"), Optimizer):
        raise TypeError("optimizer must be a function that makes one of the parameters here, got an optimizer")


# ---- in turn --------------------------------------------------------------------------------------------------------


class Bootstrap:
    """Rounds of two turns: the student learns from the teacher, then the teacher from the student.

        Bootstrap(teacher, student, hard_share=0.5).fit(loader, rounds=3, epochs=2)

    Whoever learns is in training mode, whoever teaches is fixed and in evaluation mode: a turn is a whole distillation.
    Both learn from the labels as well, without which the two may agree on anything. In the article both are updated in
    one loop, with labels that each has drawn before the other's last update.

    Args:
        teacher, student: modules; both are trained.
        hard_share: of a batch's rows, those with the largest loss of the learner; all if 1.
        kd_weight, ce_weight, temperature: ``KD``'s.
        options: ``Distiller``'s, for both.

    Raises:
        ValueError: one model as both, no weight of the labels, or a share that is not in (0, 1].
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        hard_share: float = 1.0,
        temperature: float = 2.0,
        kd_weight: float = 0.5,
        ce_weight: float = 0.5,
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        if teacher is student:
            raise ValueError("bootstrap needs two models, got one as both teacher and student")
        if not ce_weight > 0.0:
            raise ValueError(
                f"ce_weight must be positive, got {ce_weight}: without labels the two may agree on anything"
            )
        self.teacher, self.student = teacher, student
        hard = {} if hard_share == 1.0 else {"row_weight": hardest(hard_share)}
        self._objective = KD(temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight, **hard)
        folders = (None, None) if folder is None else (Path(folder) / "student", Path(folder) / "teacher")
        self._learners = tuple(
            Rounds(model, folder=place, **options) for model, place in zip((student, teacher), folders, strict=True)
        )

    def fit(
        self, loader: Iterable[Any], *, rounds: int, epochs: int, **plan: Any
    ) -> tuple[list[History], list[History]]:
        """``rounds`` times both turns of ``epochs``. Returns the student's histories, and the teacher's."""
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        histories: tuple[list[History], list[History]] = ([], [])
        for _ in range(rounds):
            for learner, other, history in zip(self._learners, (self.teacher, self.student), histories, strict=True):
                history.append(learner.next(other, self._objective).fit(loader, epochs=epochs, **plan))
        return histories


# ---- by the measured gap --------------------------------------------------------------------------------------------


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
