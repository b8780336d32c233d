"""Cross-domain distillation: a teacher of the source domain, a student of an unlabelled target domain."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdfast._paths import local_folder
from kdfast.distill.distiller import Distiller
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective, Step
from kdfast.recipes._plan import keep_to_plan
from kdfast.recipes.rounds import History, Rounds, check_options
from kdfast.recipes.weighting import confident

__all__ = ["CrossDomain", "Unlabelled"]


class Unlabelled(nn.Module):
    """An objective without the batches' labels, which a loader may have for evaluation alone.

    Args:
        objective: a function of a ``Step``, which is called with ``labels=None``. A module is trained with it.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.options = getattr(objective, "options", {})

    def forward(self, step: Step) -> Tensor:
        return self.objective(replace(step, labels=None))


class CrossDomain:
    """Distillation across domains: a teacher of a labelled source domain trains a student on unlabelled target inputs::

        CrossDomain(teacher, student, confidence=0.8).fit(source, target, epochs=20, rounds=2)

    From the second round on, the teacher is a copy of the student (noisy student, Xie et al. 2020), and the predictions
    of which it is confident train the student further. Labels of the target domain are never used: its batches are
    inputs alone, or have labels for an evaluation. What the student can reach is bounded by its teacher's knowledge of
    the target, not by the number of rounds.

    Args:
        teacher: a module that ``fit`` trains on the source, or one that is trained already (``source=None``).
        student: a module of any architecture.
        confidence: rows where the teacher's largest probability is lower have no weight, as in ``confident``. 0 takes
            all rows, 1 only those of which the teacher is certain.
        temperature: of the KL divergence that trains the student.
        objective: of the student, instead of that divergence over confident rows.
        folder: where checkpoints are kept: the teacher's in ``teacher``, those of each round in ``round-<number>``.
        options: ``Distiller``'s, for teacher and student.

    Raises:
        ValueError: ``confidence`` is not in [0, 1].
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        confidence: float = 0.0,
        temperature: float = 2.0,
        objective: Objective | None = None,
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        soft = KD(temperature=temperature, kd_weight=1.0, ce_weight=0.0, row_weight=confident(confidence))
        self.teacher, self.student = teacher, student
        self._objective = Unlabelled(soft if objective is None else objective)
        self._folder, self._options = local_folder(folder), options
        self._rounds = Rounds(student, folder=self._folder, **options)

    def fit(
        self,
        source: Iterable[Any] | None,
        target: Iterable[Any],
        *,
        epochs: int,
        rounds: int = 1,
        teacher_epochs: int | None = None,
        **plan: Any,
    ) -> list[History]:
        """Train the teacher on the source, then the student on the target, round by round.

        Args:
            source: batches with labels; None for a teacher that is trained already.
            target: batches of the target domain.
            epochs: of the student in each round.
            rounds: how often the student is trained.
            teacher_epochs: of the teacher; ``epochs`` if None.
            plan: ``Distiller.fit``'s other options for each round; the teacher's training gets ``resume`` and
                ``progress`` of them.

        Returns:
            The student's history of each round.

        Raises:
            ValueError: ``rounds`` is less than 1, or the folder is of other epochs.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        teacher_epochs = teacher_epochs or epochs
        trained = {"epochs": epochs, "teacher_epochs": None if source is None else teacher_epochs}
        keep_to_plan(self._folder, plan.get("resume", True), **trained)
        if source is not None:
            folder = None if self._folder is None else self._folder / "teacher"
            shared = {name: plan[name] for name in ("resume", "progress") if name in plan}
            Distiller(self.teacher, folder=folder, **self._options).fit(source, epochs=teacher_epochs, **shared)
        teacher, histories = self.teacher, []
        for _ in range(rounds):
            histories.append(self._rounds.next(teacher, self._objective).fit(target, epochs=epochs, **plan))
            teacher = copy.deepcopy(self.student)
        return histories
