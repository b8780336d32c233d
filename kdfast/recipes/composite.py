"""Sums of objectives: of several losses, of a cohort's students, of students that teach one another, of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from kdfast.recipes._inputs import counted_rows, unpacked_teachers

__all__ = ["Cohort", "CohortOutput", "Combined", "EachStudent", "MultiTask", "MutualLearning", "TaskOutput"]


class _Composite(nn.Module):
    """An objective made of others. Those that are modules are trained, moved and saved with it, as ``submodules``."""

    def __init__(self, objectives: Iterable[Objective]) -> None:
        super().__init__()
        self.submodules = nn.ModuleList(x for x in objectives if isinstance(x, nn.Module))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Checkpoints of versions before 1.0 have another name for them.
        before = f"{prefix}modules_among_them."
        for name in [name for name in state_dict if name.startswith(before)]:
            state_dict[f"{prefix}submodules.{name.removeprefix(before)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _options_of(objectives: Iterable[Objective]) -> dict[str, Any]:
    """The options of the first objective that has some: a sum counts rows by its rule."""
    return next((x.options for x in objectives if hasattr(x, "options")), {})


# ---- several losses -------------------------------------------------------------------------------------------------


class Combined(_Composite):
    """A weighted sum of objectives, ``sum(weight * objective(step))``, such as KD and a relation loss::

        Combined(KD(temperature=4.0), GraphAttention(), weights=(1.0, 0.1))

    Objectives that are modules are trained, and saved in checkpoints, with the sum. Which rows count for the trainer is
    decided by the ``ignore_index`` and ``shift`` of the first objective that has options.

    Args:
        objectives: functions of a ``Step``, one or more.
        weights: one per objective; all 1 if None.

    Raises:
        ValueError: there is no objective, or the number of weights is another.
    """

    def __init__(self, *objectives: Objective, weights: Sequence[float] | None = None) -> None:
        super().__init__(objectives)
        if not objectives:
            raise ValueError("Combined needs at least one objective, got none")
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(objectives)
        if len(self.weights) != len(objectives):
            raise ValueError(f"{len(objectives)} objectives need as many weights, got {len(self.weights)}")
        self.objectives = objectives
        self.options = _options_of(objectives)

    def forward(self, step: Step) -> Tensor:
        step = unpacked_teachers(step)
        terms = [weight * part(step) for weight, part in zip(self.weights, self.objectives, strict=True)]
        return sum(terms[1:], terms[0])


# ---- several students -----------------------------------------------------------------------------------------------


@dataclass
class CohortOutput:
    """The outputs of a ``Cohort``'s students for one batch.

    Attributes:
        outputs: one per student, as its forward returned it.
    """

    outputs: tuple[Any, ...]

    @cached_property
    def logits(self) -> Tensor:
        """The log of the students' averaged probabilities: the logits of their ensemble."""
        log_probs = torch.stack([logits_of(x).log_softmax(-1) for x in self.outputs])
        return log_probs.logsumexp(0) - torch.tensor(float(len(self.outputs))).log().to(log_probs)


class Cohort(nn.Module):
    """Several students as one module, called with the same arguments and trained by one optimiser::

        cohort = Cohort(small, tiny)
        Distiller(cohort, teacher, objective=EachStudent(KD(temperature=4.0))).fit(loader, epochs=20)

    The teacher, or the cache, is asked once per batch for all of them. Students share no parameter, so each gets the
    gradient that it would get alone, except under ``clip_norm``, which measures all of them together. The trainer's
    metrics are those of the ensemble; evaluate ``cohort.students[i]`` for one student's.

    Raises:
        ValueError: there are fewer than two models, or they share parameters.
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


class EachStudent(_Composite):
    """The sum of the objectives of a ``Cohort``'s students, each computed from that student's output alone.

    Args:
        objectives: one for all students, or a sequence of one per student.

    Raises:
        ValueError: when it is called, where the student is no cohort, or has another number of students.
    """

    def __init__(self, objectives: Objective | Sequence[Objective]) -> None:
        found = (objectives,) if callable(objectives) else tuple(objectives)
        super().__init__(found)
        self.objectives = objectives if callable(objectives) else found
        self.options = _options_of(found)

    def forward(self, step: Step) -> Tensor:
        steps = _each_student(step)
        objectives = (self.objectives,) * len(steps) if callable(self.objectives) else self.objectives
        if len(objectives) != len(steps):
            raise ValueError(f"a cohort of {len(steps)} students needs as many objectives, got {len(objectives)}")
        return torch.stack([objective(one) for objective, one in zip(objectives, steps, strict=True)]).sum()


def _each_student(step: Step) -> tuple[Step, ...]:
    """The step as each student of a cohort sees it."""
    if not isinstance(step.student, CohortOutput):
        raise ValueError(f"this objective needs a Cohort of students, got a {type(step.student).__name__}")
    step = unpacked_teachers(step)
    return tuple(replace(step, student=output) for output in step.student.outputs)


class MutualLearning(_Composite):
    """Deep mutual learning: each student of a ``Cohort`` learns from labels and from the other students::

        sum_i ( own_i + peer_weight / (K - 1) * sum_{j != i} T^2 KL(p_j || p_i) ),   p_j held constant

    Source: Zhang et al. 2018. All students move at once, from one step's outputs. The article's co-training loops over
    the students with a teacher variable left over from the loop before, so that later students learn from one teacher
    only; here ``own``, such as an ensemble's objective, gives every student all teachers that the distiller has.

    Args:
        own: each student's objective besides its peers; ``KD()`` if None, which is cross-entropy where the distiller
            has no teacher.
        peer_weight: of the KL divergences to the peers.
        temperature: T of these divergences.

    Raises:
        ValueError: when it is called, where the student is no cohort.
    """

    def __init__(self, own: Objective | None = None, *, peer_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(() if own is None else (own,))
        self.own: Objective = KD() if own is None else own
        self.options = _options_of((self.own,))
        self.peer_weight, self.temperature = peer_weight, temperature

    def forward(self, step: Step) -> Tensor:
        steps = _each_student(step)
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
    """A model's outputs by task: a dict that stands for its first task where one output is wanted.

    A cache and the trainer's metrics take ``logits``, which are those of the first task.
    """

    @property
    def logits(self) -> Tensor:
        """The first task's logits."""
        return logits_of(next(iter(self.values())))  # type: ignore[no-any-return]


class MultiTask(_Composite):
    """A weighted sum over tasks, ``sum_t weight_t * objective_t``, of a student that returns its outputs by task::

        MultiTask({"topic": KD(temperature=2.0), "tone": KD(divergence="jsd")}, labels=lambda batch: batch["of_task"])

    The student returns a ``TaskOutput``, or another mapping from tasks. So does the teacher, which runs once per batch;
    or there are as many teachers or caches as tasks, in the tasks' order.

    Args:
        objectives: a function of a ``Step`` for each task.
        weights: by task; all 1 if None.
        labels: a function of the batch giving labels by task; no task has labels if None.

    Raises:
        ValueError: the weights lack a task; or, when it is called, the student, the teacher or the labels do.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        *,
        weights: Mapping[str, float] | None = None,
        labels: Callable[[Any], Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(objectives.values())
        if not objectives:
            raise ValueError("MultiTask needs at least one task, got none")
        self.objectives, self.labels = dict(objectives), labels
        self.weights = dict.fromkeys(objectives, 1.0) if weights is None else _by_task(objectives, weights, "weights")

    def forward(self, step: Step) -> Tensor:
        tasks = list(self.objectives)
        student = _by_task(tasks, step.student, "the student's output")
        teacher = _by_task(tasks, _named(tasks, step.teacher), "the teacher's output")
        labels = {} if self.labels is None else _by_task(tasks, self.labels(step.batch), "labels")
        return torch.stack(
            [
                self.weights[task]
                * self.objectives[task](
                    replace(step, student=student[task], teacher=teacher[task], labels=labels.get(task))
                )
                for task in tasks
            ]
        ).sum()


def _named(tasks: list[str], teacher: Any) -> Any:
    """A step's teacher as a mapping from the tasks, where it is None or a tuple."""
    if teacher is None:
        return dict.fromkeys(tasks)
    if not isinstance(teacher, tuple):
        return teacher
    if len(teacher) != len(tasks):
        raise ValueError(f"{len(tasks)} tasks need as many teachers, or one that knows all, got {len(teacher)}")
    return dict(zip(tasks, teacher, strict=True))


def _by_task(tasks: Iterable[str], values: Any, what: str) -> dict[str, Any]:
    """``values`` of the tasks. Raises ``ValueError``, calling them ``what``, where a task is missing."""
    tasks = list(tasks)
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping from the tasks {', '.join(tasks)}, got a {type(values).__name__}")
    missing = [task for task in tasks if task not in values]
    if missing:
        raise ValueError(f"{what} must have the tasks {', '.join(tasks)}, lacks {', '.join(missing)}")
    return {task: values[task] for task in tasks}
