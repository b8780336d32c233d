"""``Cohort``: several students side by side, trained by one optimiser from one teacher pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.distill.step import Objective, Step
from kdfast.models import logits_of
from kdfast.recipes._rows import decoded

__all__ = ["Cohort", "CohortOutput", "EachStudent"]


@dataclass
class CohortOutput:
    """What the students of a cohort say: ``outputs``, and ``logits`` of their averaged probabilities."""

    outputs: tuple[Any, ...]

    @cached_property
    def logits(self) -> Tensor:
        log_probs = torch.stack([logits_of(x).log_softmax(-1) for x in self.outputs])
        return log_probs.logsumexp(0) - torch.tensor(float(len(self.outputs))).log().to(log_probs)


class Cohort(nn.Module):
    """Several models as one, of the same arguments.

        cohort = Cohort(small, tiny)
        Distiller(cohort, teacher, objective=EachStudent(KD(temperature=4.0))).fit(loader, epochs=20)

    The teacher, or the cache, is asked once per batch. Students share no parameter, so each gets the gradient that it
    would get alone; ``clip_norm``, which measures all of them together, is the exception. A metric of a cohort is that
    of the ensemble: evaluate ``cohort.students[i]`` for one's own.

    Raises:
        ValueError: less than two models, or models that share parameters.
    """

    def __init__(self, *students: nn.Module) -> None:
        super().__init__()
        if len(students) < 2:
            raise ValueError(f"a cohort needs two students or more, got {len(students)}")
        parameters = [id(parameter) for student in students for parameter in student.parameters()]
        if len(set(parameters)) != len(parameters):
            raise ValueError("the students of a cohort must not share parameters: pass models of their own")
        self.students = nn.ModuleList(students)

    def forward(self, *args: Any, **kwargs: Any) -> CohortOutput:
        return CohortOutput(tuple(student(*args, **kwargs) for student in self.students))


class EachStudent(nn.Module):
    """The sum of each student's own objective: multi-student distillation, of a ``Cohort``.

    Args:
        objectives: one that all students have, or one per student.

    Raises:
        ValueError: the student is no cohort, or one of another size.
    """

    def __init__(self, objectives: Objective | Sequence[Objective]) -> None:
        super().__init__()
        self.objectives = objectives if callable(objectives) else tuple(objectives)
        found = (objectives,) if callable(objectives) else objectives
        self.options: dict[str, Any] = next((x.options for x in found if hasattr(x, "options")), {})
        self.modules_among_them = nn.ModuleList(x for x in found if isinstance(x, nn.Module))

    def forward(self, step: Step) -> Tensor:
        steps = each_student(step)
        objectives = (self.objectives,) * len(steps) if callable(self.objectives) else self.objectives
        if len(objectives) != len(steps):
            raise ValueError(f"a cohort of {len(steps)} students needs as many objectives, got {len(objectives)}")
        return torch.stack([objective(one) for objective, one in zip(objectives, steps, strict=True)]).sum()


def each_student(step: Step) -> tuple[Step, ...]:
    """The step as each student of a cohort sees it."""
    if not isinstance(step.student, CohortOutput):
        raise ValueError(f"this objective needs a Cohort of students, got a {type(step.student).__name__}")
    said = decoded(step)
    return tuple(replace(said, student=output) for output in step.student.outputs)
