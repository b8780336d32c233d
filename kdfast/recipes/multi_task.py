"""Several tasks of one student, from one teacher pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.distill.step import Objective, Step
from kdfast.models import logits_of

__all__ = ["MultiTask", "TaskOutput"]


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
