"""Several rounds of training: two models that teach each other in turn, and a weight that follows the gap."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kdfast._paths import local_folder
from kdfast.distill.distiller import Distiller
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective
from kdfast.recipes._plan import keep_to_plan
from kdfast.recipes.weighting import hardest

__all__ = ["AdaptiveKD", "Bootstrap", "History", "Rounds", "check_options"]

History = list[dict[str, Any]]


class Rounds:
    """The distillers of one student, round by round, with one optimizer whose learning rate starts again each round.

    Each round has a subfolder of ``folder``, so that a recipe that was stopped resumes in its current round.
    """

    def __init__(self, student: nn.Module, *, folder: str | Path | None = None, **options: Any) -> None:
        check_options(options)
        self.student, self._folder, self._options = student, local_folder(folder), options
        self._count = 0

    def next(self, teacher: Any, objective: Objective) -> Distiller:
        """The distiller of the next round."""
        self._count += 1
        folder = None if self._folder is None else self._folder / f"round-{self._count}"
        distiller = Distiller(self.student, teacher, objective=objective, folder=folder, **self._options)
        self._options["optimizer"] = distiller.optimizer
        self._options.pop("lr", None)  # that the optimizer was made with
        return distiller


def check_options(options: dict[str, Any]) -> None:
    """Raise ``TypeError`` where the options hold an optimizer: it is of one model, and there are several."""
    if isinstance(options.get("optimizer"), Optimizer):
        raise TypeError("optimizer must be a function that makes one of the parameters here, got an optimizer")


# ---- in turn --------------------------------------------------------------------------------------------------------


class Bootstrap:
    """Two models that teach each other in turn: the student learns from the teacher, then the teacher from it::

        Bootstrap(teacher, student, hard_share=0.5).fit(loader, rounds=3, epochs=2)

    A turn is a whole distillation: the model that learns is in training mode, the other is fixed and in evaluation
    mode. Both learn from the labels as well, without which the two may agree on anything. In the article both are
    updated in one loop, with labels that each has drawn before the other's last update.

    Args:
        teacher, student: modules; both are trained.
        hard_share: the share of a batch's rows that counts, those with the learner's largest losses; all rows if 1.
        temperature, kd_weight, ce_weight: ``KD``'s.
        folder: where checkpoints are kept, in ``student/round-<number>`` and ``teacher/round-<number>``.
        options: ``Distiller``'s, for both models.

    Raises:
        ValueError: one model is both, ``ce_weight`` is not positive, or ``hard_share`` is not in (0, 1].
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
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
        self.teacher, self.student, self._folder = teacher, student, local_folder(folder)
        hard = {} if hard_share == 1.0 else {"row_weight": hardest(hard_share)}
        self._objective = KD(temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight, **hard)
        folders = (None, None) if self._folder is None else (self._folder / "student", self._folder / "teacher")
        self._learners = tuple(
            Rounds(model, folder=place, **options) for model, place in zip((student, teacher), folders, strict=True)
        )

    def fit(
        self, loader: Iterable[Any], *, rounds: int, epochs: int, **plan: Any
    ) -> tuple[list[History], list[History]]:
        """Train the student and then the teacher, ``rounds`` times.

        Args:
            loader: as ``Distiller.fit`` takes it.
            rounds: how often each model learns.
            epochs: of each turn.
            plan: ``Distiller.fit``'s other options, for each turn.

        Returns:
            The student's histories, one per round, and the teacher's.

        Raises:
            ValueError: ``rounds`` is less than 1, or the folder is of turns of other epochs.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        keep_to_plan(self._folder, plan.get("resume", True), epochs=epochs)
        histories: tuple[list[History], list[History]] = ([], [])
        for _ in range(rounds):
            for learner, other, history in zip(self._learners, (self.teacher, self.student), histories, strict=True):
                history.append(learner.next(other, self._objective).fit(loader, epochs=epochs, **plan))
        return histories


# ---- by the measured gap --------------------------------------------------------------------------------------------


class AdaptiveKD:
    """Distillation in rounds, in which the teacher's weight follows how far the student is behind::

        gap = teacher_score - score of the student
        kd_weight = low + (high - low) * min(1, max(0, gap) / first gap),   ce_weight = 1 - kd_weight

    The student is measured after each round, and training stops when the gap is at most ``tolerance``. The first round
    has ``kd_weight = high``. The gap after it is the scale of the later ones, so the weights do not depend on the unit
    of the score. The article raises the weight of a weak student without saying by how much, or when it ends.

    Args:
        student, teacher: as ``Distiller`` takes them.
        teacher_score: the teacher's ``monitor`` on the data that the student is measured on. These must not be the test
            set, since the weights depend on them.
        low, high: bounds of ``kd_weight``, in [0, 1].
        tolerance: the gap at which the student is good enough.
        monitor: the name of a number in ``Distiller.fit``'s records that grows with quality.
        temperature: ``KD``'s.
        folder: where checkpoints are kept, in ``round-<number>``.
        options: ``Distiller``'s others.

    Attributes:
        kd_weights: the weight of each round so far.
        gaps: the gap after each round so far.

    Raises:
        ValueError: not 0 <= low <= high <= 1.
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
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
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"weights must be 0 <= low <= high <= 1, got low={low} and high={high}")
        self.teacher, self.teacher_score, self.monitor = teacher, teacher_score, monitor
        self.low, self.high, self.tolerance, self.temperature = low, high, tolerance, temperature
        self.kd_weights: list[float] = []
        self.gaps: list[float] = []
        self._folder = local_folder(folder)
        self._rounds = Rounds(student, folder=folder, **options)

    def fit(
        self, loader: Iterable[Any], *, rounds: int, epochs: int, eval_loader: Iterable[Any], **plan: Any
    ) -> list[History]:
        """Train round by round, until the gap is small enough or ``rounds`` are done.

        Args:
            loader: as ``Distiller.fit`` takes it.
            rounds: how many there are at most.
            epochs: of each round.
            eval_loader: the data that the student is measured on.
            plan: ``Distiller.fit``'s other options, for each round.

        Returns:
            The history of each round.

        Raises:
            ValueError: the records have no ``monitor``, or the folder is of rounds of other epochs.
        """
        keep_to_plan(self._folder, plan.get("resume", True), epochs=epochs)
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
        """The ``kd_weight`` of the next round, given the gaps so far."""
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
