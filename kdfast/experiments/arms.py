"""Arms: what one is, the controls, plain KD, and plain KD with other losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor, nn

import kdfast
from kdfast.distill import KD, Objective, Step
from kdfast.experiments.store import Options
from kdfast.experiments.tasks import Labelled, Task
from kdfast.experiments.training import WithFeatures, fit
from kdfast.objectives import (
    Hint,
    dist_loss,
    entropy_matching,
    margin_ce,
    pairwise_hinge,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from kdfast.recipes import Combined, HardTargets

__all__ = [
    "BLEND",
    "CONTROLS",
    "FEATURES",
    "LOSSES",
    "PLAIN",
    "SOFT",
    "TEACHER",
    "TEMPERATURES",
    "UPPER_BOUND",
    "Arm",
    "distil",
    "distil_all",
    "grid",
]


@dataclass(frozen=True)
class Arm:
    """One way to train a student, to be compared with others.

    Attributes:
        name: its key in results and on the command line.
        title: its name in the report.
        train: ``train(task, **options)`` returns the trained student.
        candidates: the options to choose from on the validation split, as many for every arm of an experiment. Where
            nothing is tuned, the first are taken.
        bound: whether it has labels that other arms do not have: it is shown and not compared.
    """

    name: str
    title: str
    train: Callable[..., nn.Module]
    candidates: tuple[Options, ...]
    bound: bool = False


def grid(**values: list[Any]) -> tuple[Options, ...]:
    """Every combination of options: ``grid(a=[1, 2], b=[3])`` is ``({"a": 1, "b": 3}, {"a": 2, "b": 3})``."""
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


TEMPERATURES = grid(temperature=[1.0, 2.0, 4.0, 8.0])


# ---- students without KD, plain KD, and the controls that an honest comparison needs --------------------------------


BLEND: dict[str, Any] = {"kd_weight": 0.9, "ce_weight": 0.1}  # chosen for the demo, on a part of the training split
SOFT: dict[str, Any] = {"kd_weight": 1.0, "ce_weight": 0.0}


def distil(task: Task, objective: Objective, teacher: Any = None) -> nn.Module:
    """The student, trained on its labelled inputs by ``objective``, with the task's teacher if ``teacher`` is None."""
    teacher = task.precomputed_teacher if teacher is None else teacher
    return fit(task.student(), task.labelled, task.settings.student, task.seed, teacher=teacher, objective=objective)


def distil_all(task: Task, objective: Objective, teacher: Any = None) -> nn.Module:
    """The student, trained on all inputs, without labels, with the task's teacher if ``teacher`` is None."""
    teacher = task.precomputed_teacher if teacher is None else teacher
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
    return distil(task, KD(temperature=temperature, **BLEND), task.precompute(task.own_teacher))


def kd_own_all(task: Task, temperature: float) -> nn.Module:
    return distil_all(task, KD(temperature=temperature, **SOFT), task.precompute(task.own_teacher))


def kd_all(task: Task, temperature: float) -> nn.Module:
    return distil_all(task, KD(temperature=temperature, **SOFT))


def pseudo_labels(task: Task, **schedule: Any) -> nn.Module:
    student = replace(task.settings.student, **schedule)
    return fit(
        task.student(), (task.inputs,), student, task.seed, teacher=task.precomputed_teacher, objective=HardTargets()
    )


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


# ---- plain KD with another loss: divergences, margins, relations, features ------------------------------------------


STUDENT_WIDTH, TEACHER_WIDTH = 16, 128  # of the inputs of their last layers

Loss = Callable[[Tensor, Tensor], Tensor]


def divergence(task: Task, name: str | kdfast.Divergence, temperature: float) -> nn.Module:
    return distil(task, KD(divergence=name, temperature=temperature, **BLEND))


def dkd(task: Task, temperature: float, beta: float) -> nn.Module:
    return divergence(task, kdfast.dkd(1.0, beta), temperature)


def logit_mse(task: Task, kd_weight: float) -> nn.Module:
    return distil(task, KD(divergence="logit_mse", kd_weight=kd_weight, ce_weight=0.1))


def dist(task: Task, temperature: float, weight: float) -> nn.Module:
    def loss(step: Step) -> Tensor:
        return dist_loss(step.logits, step.teacher, temperature=temperature, beta=weight, gamma=weight)

    return distil(task, Combined(KD(kd_weight=0.0, ce_weight=1.0), loss))


def margin(task: Task, loss: Callable[..., Any], margin: float) -> nn.Module:
    """The student, trained by a margin loss of the labels alone, without a teacher."""
    return fit(
        task.student(),
        task.labelled,
        task.settings.student,
        task.seed,
        objective=lambda step: loss(step.logits, step.labels, margin),
    )


def entropy(task: Task, temperature: float, weight: float) -> nn.Module:
    def loss(step: Step) -> Tensor:
        return entropy_matching(step.logits, step.teacher, temperature=temperature)

    return distil(task, Combined(KD(temperature=temperature, **BLEND), loss, weights=(1.0, weight)))


def features(task: Task, loss: Callable[[], Loss], temperature: float, weight: float) -> nn.Module:
    """The student, trained by plain KD and by ``loss()`` of the inputs of student's and teacher's last layers."""
    student, teacher = WithFeatures(task.student()), task.precompute(WithFeatures(task.teacher))
    objective = Combined(KD(temperature=temperature, **BLEND), FeatureLoss(loss()), weights=(1.0, weight))
    fit(student, task.labelled, task.settings.student, task.seed, teacher=teacher, objective=objective)
    return student.model


class FeatureLoss(nn.Module):
    """An objective that is a loss of the student's and the teacher's features. Its parameters are trained."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, step: Step) -> Tensor:
        return self.loss(step.student["features"], step.teacher["features"])


def _rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd_distance(student, teacher) + 2.0 * rkd_angle(student, teacher)  # the paper's weights


def _divergence(name: str, title: str, value: str | kdfast.Divergence | None = None) -> Arm:
    return Arm(name, title, partial(divergence, name=value or name), TEMPERATURES)


def _features(name: str, title: str, loss: Callable[[], Loss], weights: list[float]) -> Arm:
    return Arm(name, title, partial(features, loss=loss), grid(temperature=[1.0, 4.0], weight=weights))


_MARGINS = grid(margin=[1.0, 0.5, 2.0, 4.0])

LOSSES = (
    _divergence("reverse_kl", "reverse KL"),
    _divergence("jsd", "Jensen-Shannon"),
    _divergence("tvd", "total variation"),
    _divergence("skew_forward_kl", "skewed KL (DistiLLM)"),
    _divergence("alpha_beta", "alpha-beta (ABKD)"),
    _divergence("ls_kd", "standardised logits (LS-KD)", kdfast.Divergence("forward_kl", standardize=True)),
    Arm("dkd", "decoupled KD (DKD)", dkd, grid(temperature=[1.0, 4.0], beta=[1.0, 8.0])),
    Arm("logit_mse", "MSE of the logits", logit_mse, grid(kd_weight=[0.1, 0.3, 1.0, 3.0])),
    Arm("dist", "correlations (DIST)", dist, grid(temperature=[1.0, 4.0], weight=[1.0, 2.0])),
    Arm("entropy", "KD + entropy matching", entropy, grid(temperature=[1.0, 4.0], weight=[0.1, 1.0])),
    Arm("margin_ce", "margin, labels only", partial(margin, loss=margin_ce), _MARGINS),
    Arm("hinge", "pairwise hinge, labels only", partial(margin, loss=pairwise_hinge), _MARGINS),
)
FEATURES = (
    _features("hint_mse", "KD + hint, MSE", partial(Hint, STUDENT_WIDTH, TEACHER_WIDTH), [0.1, 1.0]),
    _features("hint_cosine", "KD + hint, cosine", partial(Hint, STUDENT_WIDTH, TEACHER_WIDTH, "cosine"), [0.1, 1.0]),
    _features("rkd", "KD + distances and angles (RKD)", lambda: _rkd, [1.0, 10.0]),
    _features("sp", "KD + similarities (SP)", lambda: similarity_preserving, [10.0, 100.0]),
    _features("pkt", "KD + PKT", lambda: pkt, [1.0, 10.0]),
)
