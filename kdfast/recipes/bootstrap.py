"""Bootstrap: teacher and student that teach each other in turn, on what is hard for the learner."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from kdfast.distill.objective import KD
from kdfast.recipes._rounds import History, Rounds
from kdfast.recipes.hard_examples import hardest

__all__ = ["Bootstrap"]


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
