"""Recipes that arrange training: several models after one another, or one that changes."""

from __future__ import annotations

from typing import Any

from torch import nn

from kdfast.demo import models
from kdfast.distill import KD
from kdfast.experiments.arm import TEMPERATURES, Arm, grid
from kdfast.experiments.arms_plain import BLEND
from kdfast.experiments.tasks import Task
from kdfast.experiments.training import Batches, adamw
from kdfast.recipes import (
    AdaptiveKD,
    Bootstrap,
    BornAgain,
    Growing,
    TeacherAssistants,
    ramp_up,
    self_distillation,
    widen,
)

__all__ = ["CHAINS", "SELF_TAUGHT"]

ROUNDS = 4
QUIET: dict[str, Any] = {"progress": False}


def ema(task: Task, decay: float, weight: float) -> nn.Module:
    """The student's own average teaches it; the student is scored."""
    student = task.student()
    objective = KD(temperature=1.0, kd_weight=ramp_up(weight), ce_weight=1.0)
    distiller = self_distillation(student, decay=decay, objective=objective, **_trainer(task))
    distiller.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return student


def born_again(task: Task, temperature: float) -> nn.Module:
    """Three generations, the first one of labels; the last one is scored."""
    students = [task.student(offset) for offset in (2, 1, 0)]
    chain = BornAgain(None, students, temperature=temperature, **BLEND, **_trainer(task))
    chain.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return students[-1]


def bootstrap(task: Task, share: float, kd_weight: float) -> nn.Module:
    """Two students that teach each other in turn, each as often as one is trained elsewhere; the first is scored."""
    peer, student = task.student(offset=1), task.student()
    weights: dict[str, Any] = {"kd_weight": kd_weight, "ce_weight": 1.0 - kd_weight}
    recipe = Bootstrap(peer, student, hard_share=share, temperature=1.0, **weights, **_trainer(task))
    recipe.fit(_labelled(task), rounds=ROUNDS, epochs=max(1, _epochs(task) // ROUNDS), **QUIET)
    return student


def growth(task: Task, temperature: float) -> nn.Module:
    """Half as wide for half of the epochs, then widened to the student's width."""
    small = models.build(_narrow, task.seed, "cpu")
    recipe = Growing(
        small, task.told, grow=lambda model: widen(model, 0, 16), temperature=temperature, **BLEND, **_trainer(task)
    )
    recipe.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return recipe.student


def assistant(task: Task, temperature: float) -> nn.Module:
    """An MLP of 64 hidden units between the CNN and the student."""
    middle, student = models.build(_wide, task.seed, "cpu"), task.student()
    chain = TeacherAssistants(task.told, [middle, student], temperature=temperature, **BLEND, **_trainer(task))
    chain.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return student


def adaptive(task: Task, temperature: float) -> nn.Module:
    """Measured by its agreement with the teacher on images without labels."""
    student = task.student()
    recipe = AdaptiveKD(
        student, task.told, teacher_score=1.0, monitor="agreement", temperature=temperature, **_trainer(task)
    )
    unlabelled = [(task.inputs,)]
    epochs = max(1, _epochs(task) // ROUNDS)
    recipe.fit(_labelled(task), rounds=ROUNDS, epochs=epochs, eval_loader=unlabelled, metrics=["agreement"], **QUIET)
    return student


def _trainer(task: Task) -> dict[str, Any]:
    return {"optimizer": adamw(task.settings.student), "schedule": "cosine"}


def _labelled(task: Task) -> Batches:
    return Batches(task.labelled, task.settings.student, task.seed)


def _epochs(task: Task) -> int:
    return task.settings.student.epochs


def _narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


SELF_TAUGHT = (
    Arm("ema", "own average as teacher", ema, grid(decay=[0.99, 0.999], weight=[0.3, 1.0])),
    Arm("born_again", "born again, three generations", born_again, TEMPERATURES),
    Arm("bootstrap", "two students in turn", bootstrap, grid(share=[1.0, 0.5], kd_weight=[0.5, 0.8])),
)
CHAINS = (
    Arm("growth", "student that grows", growth, TEMPERATURES),
    Arm("assistant", "teacher assistant", assistant, TEMPERATURES),
    Arm("adaptive", "weight by measured gap", adaptive, TEMPERATURES),
)
