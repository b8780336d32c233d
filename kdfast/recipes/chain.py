"""Students that become teachers: teacher assistants and born-again networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from kdfast._paths import local_folder
from kdfast.distill.distiller import Distiller
from kdfast.recipes._plan import keep_to_plan
from kdfast.recipes.composite import Cohort
from kdfast.recipes.rounds import History, check_options

__all__ = ["BornAgain", "Chain", "TeacherAssistants"]


class Chain:
    """Several distillations, one after another: each student is taught by the one before it, the first by ``teacher``.

    Args:
        teacher: as ``Distiller`` takes it; None where the first student learns from labels alone.
        students: in order. Each is trained to its end before the next one begins.
        folder: where checkpoints are kept: those of each student in ``student-<number>``.
        options: ``Distiller``'s and ``KD``'s, for each student.

    Raises:
        ValueError: there is no student, or a model occurs twice.
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
    """

    def __init__(
        self, teacher: Any, students: Sequence[nn.Module], *, folder: str | Path | None = None, **options: Any
    ) -> None:
        check_options(options)
        if not students or len({id(x) for x in (teacher, *students)}) <= len(students):
            raise ValueError(f"a chain needs students, each a model of its own, got {len(students)}")
        self.teacher, self.students = teacher, list(students)
        self._folder, self._options = local_folder(folder), options

    def fit(self, loader: Iterable[Any], *, epochs: int, **plan: Any) -> list[History]:
        """Train the students, one after another.

        Args:
            loader: as ``Distiller.fit`` takes it.
            epochs: of each student.
            plan: ``Distiller.fit``'s other options, for each student.

        Returns:
            The history of each student.

        Raises:
            ValueError: the folder is of a chain of other epochs.
        """
        keep_to_plan(self._folder, plan.get("resume", True), epochs=epochs)
        teacher, histories = self.teacher, []
        for number, student in enumerate(self.students, 1):
            folder = None if self._folder is None else self._folder / f"student-{number}"
            distiller = Distiller(student, teacher, folder=folder, **self._options)
            histories.append(distiller.fit(loader, epochs=epochs, **plan))
            teacher = student
        return histories


class TeacherAssistants(Chain):
    """A chain of models, each smaller than the one that teaches it (Mirzadeh et al. 2020)::

        TeacherAssistants(teacher, [assistant, student], temperature=4.0).fit(loader, epochs=20)

    A student learns better from a teacher that it can nearly equal, such as an assistant whose size lies between its
    own and the teacher's. The arguments are those of ``Chain``.

    Raises:
        ValueError: there is no assistant, or a model is not smaller than the one before.
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
    """

    def __init__(self, teacher: Any, students: Sequence[nn.Module], **options: Any) -> None:
        super().__init__(teacher, students, **options)
        if len(students) < 2:
            raise ValueError("a teacher's assistant comes before the student: pass [assistant, ..., student], got one")
        sizes = [_size(x) for x in (teacher, *students) if isinstance(x, nn.Module)]
        if any(after >= before for before, after in pairwise(sizes)):
            raise ValueError(f"each model must have fewer parameters than the one before, got {sizes}")


class BornAgain(Chain):
    """A chain of models of one architecture, each taught by the one before (BAN, Furlanello et al. 2018)::

        born_again = BornAgain(None, [make() for _ in range(3)], temperature=1.0)
        born_again.fit(loader, epochs=20)
        born_again.ensemble(images).logits

    The students are as large as their teacher, and often better; their ensemble is better still. The first one learns
    from labels where ``teacher`` is None. The article's soft labels are recorded while the teacher is trained; here a
    generation is finished, and in evaluation mode, before it teaches. The arguments are those of ``Chain``.

    Raises:
        ValueError: generations have different numbers of parameters.
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
    """

    def __init__(self, teacher: Any, students: Sequence[nn.Module], **options: Any) -> None:
        super().__init__(teacher, students, **options)
        sizes = {_size(x) for x in students}
        if len(sizes) > 1:
            raise ValueError(f"generations are of one architecture, got {sorted(sizes)} parameters: use Chain")

    @property
    def ensemble(self) -> Cohort:
        """All generations as one ``Cohort``, whose logits are of their averaged probabilities.

        Raises:
            ValueError: there is only one generation.
        """
        return Cohort(*self.students)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
