"""Arms of ``kdfast.recipes``: objectives, sequences of several trainings, and those of the domain shift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from kdfast.demo import models
from kdfast.distill import KD
from kdfast.experiments.arms import (
    BLEND,
    CONTROLS,
    PLAIN,
    SOFT,
    TEACHER,
    TEMPERATURES,
    UPPER_BOUND,
    Arm,
    distil,
    distil_all,
    grid,
)
from kdfast.experiments.tasks import Task
from kdfast.experiments.training import Batches, adamw, fit
from kdfast.recipes import (
    AdaptiveKD,
    Adversarial,
    Bootstrap,
    BornAgain,
    ClassAttention,
    Cohort,
    Combined,
    CrossDomain,
    GraphAttention,
    Growing,
    LogitEnsemble,
    MutualLearning,
    ProbabilityEnsemble,
    TeacherAssistants,
    anneal,
    class_attention,
    confidence,
    disagreement,
    discriminator,
    entropy_temperature,
    focal,
    focal_temperature,
    hardest,
    ramp_up,
    sample_attention,
    self_distillation,
    widen,
)

__all__ = ["CHAINS", "DOMAIN_SHIFT", "RECIPES", "SELF_TAUGHT"]


def ensemble(task: Task, kind: Callable[..., Any], temperature: float) -> nn.Module:
    return distil(task, kind(temperature=temperature, **BLEND), _three(task))


def ensemble_all(task: Task, temperature: float) -> nn.Module:
    return distil_all(task, ProbabilityEnsemble(temperature=temperature, **SOFT), _three(task))


def mutual(task: Task, temperature: float, peer_weight: float) -> nn.Module:
    """Train two students that teach each other without a teacher; the first is scored."""
    return _cohort(task, MutualLearning(temperature=temperature, peer_weight=peer_weight), None)


def co_training(task: Task, temperature: float, peer_weight: float) -> nn.Module:
    """Train two students that teach each other and have the teacher; the first is scored."""
    own = KD(temperature=temperature, **BLEND)
    return _cohort(
        task, MutualLearning(own, temperature=temperature, peer_weight=peer_weight), task.precomputed_teacher
    )


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
    return tuple(task.precompute(teacher) for teacher in task.teachers)


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


# ---- several models after one another, or one that changes ----------------------------------------------------------


ROUNDS = 4
QUIET: dict[str, Any] = {"progress": False}


def ema(task: Task, decay: float, weight: float) -> nn.Module:
    """Train a student whose teacher is the average of its weights; the student is scored."""
    student = task.student()
    objective = KD(temperature=1.0, kd_weight=ramp_up(weight), ce_weight=1.0)
    distiller = self_distillation(student, decay=decay, objective=objective, **_trainer(task))
    distiller.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return student


def born_again(task: Task, temperature: float) -> nn.Module:
    """Train three generations, the first on labels; the last one is scored."""
    students = [task.student(offset) for offset in (2, 1, 0)]
    chain = BornAgain(None, students, temperature=temperature, **BLEND, **_trainer(task))
    chain.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return students[-1]


def bootstrap(task: Task, share: float, kd_weight: float) -> nn.Module:
    """Train two students in turn, each for as many epochs as other arms train one; one of them is scored."""
    peer, student = task.student(offset=1), task.student()
    weights: dict[str, Any] = {"kd_weight": kd_weight, "ce_weight": 1.0 - kd_weight}
    recipe = Bootstrap(peer, student, hard_share=share, temperature=1.0, **weights, **_trainer(task))
    recipe.fit(_labelled(task), rounds=ROUNDS, epochs=max(1, _epochs(task) // ROUNDS), **QUIET)
    return student


def growth(task: Task, temperature: float) -> nn.Module:
    """Train a student of half the width for half of the epochs, then widened to the usual width."""
    small = models.build(_narrow, task.seed, "cpu")
    recipe = Growing(
        small,
        task.precomputed_teacher,
        grow=lambda model: widen(model, 0, 16),
        temperature=temperature,
        **BLEND,
        **_trainer(task),
    )
    recipe.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return recipe.student


def assistant(task: Task, temperature: float) -> nn.Module:
    """Train an MLP of 64 hidden units with the CNN for its teacher, and the student with the MLP for its teacher."""
    middle, student = models.build(_wide, task.seed, "cpu"), task.student()
    chain = TeacherAssistants(
        task.precomputed_teacher, [middle, student], temperature=temperature, **BLEND, **_trainer(task)
    )
    chain.fit(_labelled(task), epochs=_epochs(task), **QUIET)
    return student


def adaptive(task: Task, temperature: float) -> nn.Module:
    """Train a student with a weight that follows its agreement with the teacher on inputs without labels."""
    student = task.student()
    recipe = AdaptiveKD(
        student,
        task.precomputed_teacher,
        teacher_score=1.0,
        monitor="agreement",
        temperature=temperature,
        **_trainer(task),
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


# ---- the domain shift: labels in one domain, use in another ---------------------------------------------------------


def cross_domain(task: Task, rounds: int, confidence: float) -> nn.Module:
    """Train a student on the target in rounds, with as many steps in all as every other arm."""
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
