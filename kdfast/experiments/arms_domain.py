"""The arms of the domain shift: labels in one domain, use in another."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from kdfast.experiments.arm import Arm, grid
from kdfast.experiments.arms_plain import CONTROLS, PLAIN, TEACHER, UPPER_BOUND
from kdfast.experiments.tasks import Task
from kdfast.experiments.training import Batches, adamw
from kdfast.recipes import CrossDomain

__all__ = ["DOMAIN_SHIFT"]


def cross_domain(task: Task, rounds: int, confidence: float) -> nn.Module:
    """As many steps in all as every other arm's."""
    schedule, student = task.settings.student, task.student()
    recipe = CrossDomain(
        task.teacher, student, confidence=confidence, temperature=1.0, optimizer=adamw(schedule), schedule="cosine"
    )
    target = Batches((task.inputs,), schedule, task.seed)
    recipe.fit(None, target, epochs=schedule.epochs // rounds, rounds=rounds, progress=False)
    return student


def _renamed(name: str, title: str) -> Arm:
    arm = next(arm for arm in (*CONTROLS, *PLAIN, TEACHER, UPPER_BOUND) if arm.name == name)
    return replace(arm, title=title)


DOMAIN_SHIFT = (
    replace(_renamed("no_kd", "student of source labels"), name="source_only"),
    _renamed("smoothing", "the same, labels smoothed"),
    _renamed("kd", "KD on source images"),
    _renamed("pseudo_labels", "teacher's hard labels of the target"),
    _renamed("kd_all", "KD on the target, soft labels"),
    Arm("confident", "the same where the teacher is sure", cross_domain, grid(rounds=[1], confidence=[0.8])),
    Arm("iterated", "KD on the target, two rounds", cross_domain, grid(rounds=[2], confidence=[0.0])),
    Arm("iterated_confident", "two rounds, where sure", cross_domain, grid(rounds=[2], confidence=[0.8])),
    _renamed("all_labels", "student of target labels"),
    _renamed("teacher", "the teacher, trained on the source"),
)
