"""Students without KD, plain KD, and the controls that an honest comparison needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from kdfast.distill import KD, Objective
from kdfast.experiments.arm import TEMPERATURES, Arm, grid
from kdfast.experiments.tasks import Labelled, Task
from kdfast.experiments.training import fit
from kdfast.recipes import HardTargets

__all__ = ["BLEND", "CONTROLS", "PLAIN", "SOFT", "TEACHER", "UPPER_BOUND", "distil", "distil_all"]

BLEND: dict[str, Any] = {"kd_weight": 0.9, "ce_weight": 0.1}  # chosen for the demo, on a part of the training split
SOFT: dict[str, Any] = {"kd_weight": 1.0, "ce_weight": 0.0}


def distil(task: Task, objective: Objective, teacher: Any = None) -> nn.Module:
    """The student, trained on its labelled images by ``objective`` with the task's teacher, or another."""
    teacher = task.told if teacher is None else teacher
    return fit(task.student(), task.labelled, task.settings.student, task.seed, teacher=teacher, objective=objective)


def distil_all(task: Task, objective: Objective, teacher: Any = None) -> nn.Module:
    """The same on all images, without a label."""
    teacher = task.told if teacher is None else teacher
    return fit(task.student(), (task.inputs,), task.settings.student, task.seed, teacher=teacher, objective=objective)


def no_kd(task: Task, **schedule: Any) -> nn.Module:
    return _supervised(task, task.labelled, **schedule)


def all_labels(task: Task, **schedule: Any) -> nn.Module:
    return _supervised(task, task.everything, **schedule)


def smoothing(task: Task, smoothing: float) -> nn.Module:
    return fit(task.student(), task.labelled, task.settings.student, task.seed, label_smoothing=smoothing)


def kd(task: Task, temperature: float) -> nn.Module:
    return distil(task, KD(temperature=temperature, **BLEND))


def kd_own(task: Task, temperature: float) -> nn.Module:
    return distil(task, KD(temperature=temperature, **BLEND), task.remember(task.own_teacher))


def kd_own_all(task: Task, temperature: float) -> nn.Module:
    return distil_all(task, KD(temperature=temperature, **SOFT), task.remember(task.own_teacher))


def kd_all(task: Task, temperature: float) -> nn.Module:
    return distil_all(task, KD(temperature=temperature, **SOFT))


def pseudo_labels(task: Task, **schedule: Any) -> nn.Module:
    student = replace(task.settings.student, **schedule)
    return fit(task.student(), (task.inputs,), student, task.seed, teacher=task.told, objective=HardTargets())


def _supervised(task: Task, examples: Labelled, **schedule: Any) -> nn.Module:
    return fit(task.student(), examples, replace(task.settings.student, **schedule), task.seed)


_SCHEDULES = grid(weight_decay=[1e-2, 1e-1], learning_rate=[1e-2, 3e-3])

CONTROLS = (
    Arm("no_kd", "no KD", no_kd, _SCHEDULES),
    Arm("smoothing", "label smoothing", smoothing, grid(smoothing=[0.05, 0.1, 0.2, 0.4])),
    Arm("kd_own", "KD, teacher of the student's labels", kd_own, TEMPERATURES),
    Arm("kd_own_all", "the same teacher, all images", kd_own_all, TEMPERATURES),
)
PLAIN = (
    Arm("kd", "KD, labelled images", kd, TEMPERATURES),
    Arm("kd_all", "KD, all images, soft labels only", kd_all, TEMPERATURES),
    Arm("pseudo_labels", "teacher's hard labels, all images", pseudo_labels, _SCHEDULES),
)
TEACHER = Arm("teacher", "the teacher itself", lambda task: task.teacher, grid(), bound=True)
UPPER_BOUND = Arm("all_labels", "no KD, all labels", all_labels, _SCHEDULES, bound=True)
