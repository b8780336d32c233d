"""Cross-domain distillation: a teacher of the source domain, a student of an unlabelled target domain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdfast.distill.distiller import Distiller
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective, Step
from kdfast.recipes._inputs import answers_of, dense_logits, wide
from kdfast.recipes.rounds import History, Rounds, check_options

__all__ = ["CrossDomain", "Unlabelled", "confident"]


def confident(threshold: float) -> Callable[[Step], Tensor]:
    """1 for rows where the teacher's largest probability is at least ``threshold``, else 0: ``KD(row_weight=...)``.

    Source: FixMatch, Sohn et al. 2020. A weight, not a mask: the mean stays one over all rows, so that a batch of which
    the teacher is sure weighs more than one where it guesses. Raises ``ValueError`` for a threshold not in [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")

    def weights(step: Step) -> Tensor:
        probs = wide(dense_logits(answers_of(step), step.logits)).softmax(-1)
        return (probs.amax(-1) >= threshold).float()

    return weights


class Unlabelled(nn.Module):
    """An objective that never sees the batches' labels, which a loader may have for evaluation."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective  # a module is trained along
        self.options = getattr(objective, "options", {})

    def forward(self, step: Step) -> Tensor:
        return self.objective(replace(step, labels=None))


class CrossDomain:
    """Source labels train the teacher, the teacher labels target inputs, these train the student; and again.

        CrossDomain(teacher, student, confidence=0.8).fit(source, target, epochs=20, rounds=2)

    From the second round on, the teacher is the student as it was (noisy student, Xie et al. 2020): of what it has
    learned about the target domain, that which it is sure of is kept. Labels of the target domain are never used: its
    batches are inputs alone, or have labels for an evaluation. What the student can reach is bounded by its teacher's
    knowledge of the target, not by the number of rounds.

    Args:
        teacher: a module, to be trained on the source, or one that is trained already (``source=None``).
        student: of any architecture.
        confidence: rows of which the teacher is less sure have no part. 0 takes all, 1 none but certain ones.
        objective: of the student; KL at ``temperature`` over confident rows if None.
        options: ``Distiller``'s, for both.

    Raises:
        ValueError: a confidence that is not in [0, 1].
        TypeError: an optimizer that exists already.
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
        self._folder, self._options = None if folder is None else Path(folder), options
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
        """Train the teacher for ``teacher_epochs`` (``epochs`` if None), then the student, ``rounds`` times ``epochs``.

        Returns the histories of the student's rounds; ``plan`` is theirs, of which the teacher gets ``resume`` and
        ``progress``.
        """
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        if source is not None:
            folder = None if self._folder is None else self._folder / "teacher"
            shared = {name: plan[name] for name in ("resume", "progress") if name in plan}
            Distiller(self.teacher, folder=folder, **self._options).fit(
                source, epochs=teacher_epochs or epochs, **shared
            )
        teacher, histories = self.teacher, []
        for _ in range(rounds):
            histories.append(self._rounds.next(teacher, self._objective).fit(target, epochs=epochs, **plan))
            teacher = copy.deepcopy(self.student)
        return histories
