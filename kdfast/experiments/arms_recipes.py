"""Recipes that are an objective: weights, temperatures, several teachers or students, discriminators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from kdfast.distill import KD
from kdfast.experiments.arm import TEMPERATURES, Arm, grid
from kdfast.experiments.arms_plain import BLEND, SOFT, distil, distil_all
from kdfast.experiments.tasks import Task
from kdfast.experiments.training import fit
from kdfast.recipes import (
    Adversarial,
    ClassAttention,
    Cohort,
    Combined,
    GraphAttention,
    LogitEnsemble,
    MutualLearning,
    ProbabilityEnsemble,
    anneal,
    class_attention,
    confidence,
    disagreement,
    discriminator,
    entropy_temperature,
    focal,
    focal_temperature,
    hardest,
    sample_attention,
)

__all__ = ["RECIPES"]


def ensemble(task: Task, kind: Callable[..., Any], temperature: float) -> nn.Module:
    return distil(task, kind(temperature=temperature, **BLEND), _three(task))


def ensemble_all(task: Task, temperature: float) -> nn.Module:
    return distil_all(task, ProbabilityEnsemble(temperature=temperature, **SOFT), _three(task))


def mutual(task: Task, temperature: float, peer_weight: float) -> nn.Module:
    """Two students without a teacher; the first is scored."""
    return _cohort(task, MutualLearning(temperature=temperature, peer_weight=peer_weight), None)


def co_training(task: Task, temperature: float, peer_weight: float) -> nn.Module:
    """Two students with the teacher; the first is scored."""
    own = KD(temperature=temperature, **BLEND)
    return _cohort(task, MutualLearning(own, temperature=temperature, peer_weight=peer_weight), task.told)


def hard_examples(task: Task, temperature: float, share: float) -> nn.Module:
    return distil(task, KD(temperature=temperature, row_weight=hardest(share), **BLEND))


def focal_rows(task: Task, temperature: float, gamma: float) -> nn.Module:
    return distil(task, KD(temperature=temperature, row_weight=focal(gamma), **BLEND))


def annealed(task: Task, start: float, end: float) -> nn.Module:
    return distil(task, KD(temperature=anneal(start, end), **BLEND))


def equal_entropy(task: Task, share: float) -> nn.Module:
    return distil(task, KD(temperature=entropy_temperature(share), **BLEND))


def flexible(task: Task, base: float, beta: float) -> nn.Module:
    return distil(task, KD(temperature=focal_temperature(base, beta, gamma=1.0), **BLEND))


def attentive(task: Task, score: Callable[..., Any], temperature: float, sharpness: float) -> nn.Module:
    weights = sample_attention(score, temperature=sharpness)
    return distil(task, KD(temperature=temperature, row_weight=weights, **BLEND))


def attentive_classes(task: Task, temperature: float, sharpness: float) -> nn.Module:
    kd = ClassAttention(class_attention(sharpness), temperature=temperature)
    return distil(task, Combined(kd, KD(kd_weight=0.0, ce_weight=1.0), weights=(0.9, 0.1)))


def graph(task: Task, temperature: float, weight: float) -> nn.Module:
    return distil(task, Combined(KD(temperature=temperature, **BLEND), GraphAttention(), weights=(1.0, weight)))


def adversarial(task: Task, temperature: float, weight: float) -> nn.Module:
    return distil(task, Combined(KD(temperature=temperature, **BLEND), Adversarial(discriminator(10), weight=weight)))


def _three(task: Task) -> tuple[Any, ...]:
    return tuple(task.remember(teacher) for teacher in task.teachers)


def _cohort(task: Task, objective: MutualLearning, teacher: Any) -> nn.Module:
    cohort = Cohort(task.student(), task.student(offset=1))
    fit(cohort, task.labelled, task.settings.student, task.seed, teacher=teacher, objective=objective)
    return cohort.students[0]


_PEERS = grid(temperature=[1.0, 4.0], peer_weight=[0.3, 1.0])
_SHARPNESS = grid(temperature=[1.0, 4.0], sharpness=[1.0, 4.0])

RECIPES = (
    Arm("ensemble", "three teachers, probabilities", partial(ensemble, kind=ProbabilityEnsemble), TEMPERATURES),
    Arm("ensemble_logits", "three teachers, logits", partial(ensemble, kind=LogitEnsemble), TEMPERATURES),
    Arm("ensemble_all", "three teachers, all images", ensemble_all, TEMPERATURES),
    Arm("mutual", "mutual learning, no teacher", mutual, _PEERS),
    Arm("co_training", "co-training with the teacher", co_training, _PEERS),
    Arm("hard_examples", "hard-example mining", hard_examples, grid(temperature=[1.0, 4.0], share=[0.5, 0.75])),
    Arm("focal", "focal row weights", focal_rows, grid(temperature=[1.0, 4.0], gamma=[0.5, 2.0])),
    Arm("annealed", "falling temperature", annealed, grid(start=[4.0, 8.0], end=[1.0, 2.0])),
    Arm("equal_entropy", "temperature by teacher's entropy", equal_entropy, grid(share=[0.2, 0.1, 0.4, 0.6])),
    Arm("flexible", "temperature by distance (flsw)", flexible, grid(base=[2.0, 4.0], beta=[0.5, 0.9])),
    Arm("confidence", "rows the teacher is sure of", partial(attentive, score=confidence), _SHARPNESS),
    Arm("disagreement", "rows the student misses", partial(attentive, score=disagreement), _SHARPNESS),
    Arm("class_attention", "attention to classes", attentive_classes, _SHARPNESS),
    Arm("graph", "KD + graph attention", graph, grid(temperature=[1.0, 4.0], weight=[0.1, 1.0])),
    Arm("adversarial", "KD + discriminator", adversarial, grid(temperature=[1.0, 4.0], weight=[0.1, 0.3])),
)
