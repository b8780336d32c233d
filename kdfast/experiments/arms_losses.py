"""Plain KD with another loss: divergences of the logits, margins, relations and features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

import kdfast
from kdfast.distill import KD, Step
from kdfast.experiments.arm import TEMPERATURES, Arm, grid
from kdfast.experiments.arms_plain import BLEND, distil
from kdfast.experiments.tasks import Task
from kdfast.experiments.training import Featured, fit
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
from kdfast.recipes import Combined

__all__ = ["FEATURES", "LOSSES"]

STUDENT_WIDTH, TEACHER_WIDTH = 16, 128  # of what their last layers are given

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
    """Of the labels alone: there is no teacher."""
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
    """Plain KD, and ``loss()`` of what the last layers are given."""
    student, teacher = Featured(task.student()), task.remember(Featured(task.teacher))
    objective = Combined(KD(temperature=temperature, **BLEND), Compared(loss()), weights=(1.0, weight))
    fit(student, task.labelled, task.settings.student, task.seed, teacher=teacher, objective=objective)
    return student.model


class Compared(nn.Module):
    """A loss of the student's and the teacher's features; its parameters are trained along."""

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
