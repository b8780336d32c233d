"""Sums of objectives: of several losses, of a cohort's students, of students that teach one another, of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.distill.counting import Counting
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective, Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.models import logits_of
from kdfast.recipes._inputs import counted_rows, decoded

__all__ = ["Cohort", "CohortOutput", "Combined", "EachStudent", "MultiTask", "MutualLearning", "TaskOutput"]


# ---- several losses -------------------------------------------------------------------------------------------------


class Combined(nn.Module):
    """``sum(weight * objective(step))``, such as KD and a relation loss beside it.

        Combined(KD(temperature=4.0), GraphAttention(), weights=(1.0, 0.1))

    Args:
        objectives: one or more. What a module among them has to train or to remember goes with the sum.
        weights: one per objective; all 1 without.

    Raises:
        ValueError: no objective, or another number of weights.
    """

    def __init__(self, *objectives: Objective, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("Combined needs at least one objective, got none")
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(objectives)
        if len(self.weights) != len(objectives):
            raise ValueError(f"{len(objectives)} objectives need as many weights, got {len(self.weights)}")
        self.objectives = objectives
        self.options: dict[str, Any] = next((x.options for x in objectives if hasattr(x, "options")), {})
        self.modules_among_them = nn.ModuleList(x for x in objectives if isinstance(x, nn.Module))

    def forward(self, step: Step) -> Tensor:
        step = decoded(step)
        terms = [weight * part(step) for weight, part in zip(self.weights, self.objectives, strict=True)]
        return sum(terms[1:], terms[0])


# ---- several students -----------------------------------------------------------------------------------------------


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


# ---- students that teach one another --------------------------------------------------------------------------------


class MutualLearning(nn.Module):
    """Each student of a ``Cohort`` learns from labels, and from what its peers say of the same batch::

        sum_i ( own_i + peer_weight / (K - 1) * sum_{j != i} T^2 KL(p_j || p_i) ),   p_j held constant

    Source: Zhang et al. 2018. All students move at once, from one step's outputs. The article's co-training loops over
    the students with a teacher variable left over from the loop before, so that later students learn from one teacher
    only; here ``own``, such as an ensemble's objective, gives every student all teachers that the distiller has.

    Args:
        own: each student's objective besides its peers; ``KD()`` without, which is cross-entropy where the distiller
            has no teacher.
        peer_weight, temperature: of the peers' term.

    Raises:
        ValueError: the student is no cohort.
    """

    def __init__(self, own: Objective | None = None, *, peer_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.own: Objective = KD() if own is None else own
        self.modules_among_them = nn.ModuleList([own] if isinstance(own, nn.Module) else [])
        self.options = getattr(self.own, "options", {})
        self.peer_weight, self.temperature = peer_weight, temperature

    def forward(self, step: Step) -> Tensor:
        steps = each_student(step)
        logits = [logits_of(one.student) for one in steps]
        rule = Counting.of(self)
        counted = counted_rows(step, shift=rule.shift, ignore_index=rule.ignore_index)
        terms = [self.own(one) for one in steps]
        for i, mine in enumerate(logits):
            for peer in logits[:i] + logits[i + 1 :]:
                divergence = kd_loss(mine, peer.detach(), temperature=self.temperature, row_weight=counted)
                terms.append(self.peer_weight / (len(logits) - 1) * divergence)
        return torch.stack(terms).sum()


# ---- several tasks --------------------------------------------------------------------------------------------------


class TaskOutput(dict[str, Any]):
    """A student's outputs by task. Where one is asked for, by a cache or a metric, the first task's stands for all."""

    @property
    def logits(self) -> Tensor:
        return logits_of(next(iter(self.values())))  # type: ignore[no-any-return]


class MultiTask(nn.Module):
    """``sum_t weight_t * objective_t``, where the student returns a ``TaskOutput``, or another mapping from tasks.

        MultiTask({"topic": KD(temperature=2.0), "tone": KD(divergence="jsd")}, labels=lambda batch: batch["of_task"])

    The teacher returns a mapping, too, and runs once per batch; or there are as many teachers or caches as tasks, in
    the tasks' order.

    Args:
        objectives: by task.
        weights: by task; all 1 without.
        labels: each task's, of a batch. Without, no task has labels.

    Raises:
        ValueError: tasks that the weights, the student, the teacher or the labels lack.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        *,
        weights: Mapping[str, float] | None = None,
        labels: Callable[[Any], Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("MultiTask needs at least one task, got none")
        self.objectives, self.labels = dict(objectives), labels
        self.weights = dict.fromkeys(objectives, 1.0) if weights is None else _of(objectives, weights, "weights")
        self.modules_among_them = nn.ModuleList(x for x in objectives.values() if isinstance(x, nn.Module))

    def forward(self, step: Step) -> Tensor:
        tasks = list(self.objectives)
        student = _of(tasks, step.student, "the student's output")
        teacher = _of(tasks, _by_task(tasks, step.teacher), "the teacher's output")
        labels = {} if self.labels is None else _of(tasks, self.labels(step.batch), "labels")
        return torch.stack(
            [
                self.weights[task]
                * self.objectives[task](
                    replace(step, student=student[task], teacher=teacher[task], labels=labels.get(task))
                )
                for task in tasks
            ]
        ).sum()


def _by_task(tasks: list[str], teacher: Any) -> Any:
    if teacher is None:
        return dict.fromkeys(tasks)
    if not isinstance(teacher, tuple):
        return teacher
    if len(teacher) != len(tasks):
        raise ValueError(f"{len(tasks)} tasks need as many teachers, or one that knows all, got {len(teacher)}")
    return dict(zip(tasks, teacher, strict=True))


def _of(tasks: Any, values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping from the tasks {', '.join(tasks)}, got a {type(values).__name__}")
    missing = [task for task in tasks if task not in values]
    if missing:
        raise ValueError(f"{what} must have the tasks {', '.join(tasks)}, lacks {', '.join(missing)}")
    return {task: values[task] for task in tasks}
