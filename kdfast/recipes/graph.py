"""The batch as a graph: which samples a sample attends to, by the student as by the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.distill.step import Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._vectors import gram, unit, widened
from kdfast.recipes._rows import answers_of, counted_rows, dense_logits

__all__ = ["GraphAttention"]


class GraphAttention:
    """The divergence between two attentions of the batch's samples to one another::

        a_ij = softmax_{j != i}( cos(f_i, f_j) / T ),   loss = mean_i KL(a_i of the teacher || a_i of the student)

    Edges are affinities, weighted by attention as in a graph attention network (Velickovic et al. 2018), but one that
    has nothing to learn: of a learned one the teacher has no counterpart. The loss is CompRess's (Koohpayegani et al.
    2020) with the batch for anchors. It sees the geometry only: turning or scaling the features changes nothing, and
    student and teacher may differ in width. Use it beside KD: ``Combined(KD(), GraphAttention(), weights=(1.0, 0.5))``.

    Args:
        temperature: T, small for few neighbours.
        features: of a step, the student's and the teacher's (samples, ...); their logits without. Only rows that count
            have a part where they are the logits.

    Less than three samples, as the last batch of an epoch may have, give 0: a single neighbour has all attention,
    whatever the features.

    Raises:
        ValueError: a temperature that is not positive, or features of different numbers of samples.
    """

    def __init__(
        self, *, temperature: float = 0.1, features: Callable[[Step], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature, self.features = temperature, features

    def __call__(self, step: Step) -> Tensor:
        student, teacher = _logits(step) if self.features is None else self.features(step)
        if len(student) != len(teacher):
            raise ValueError(f"a graph is of the same samples, got {len(student)} and {len(teacher)}")
        if len(student) < 3:
            return widened(student[:0]).sum()
        return kd_loss(  # type: ignore[no-any-return]
            affinities(student), affinities(teacher.detach()), temperature=self.temperature, scale_by_t2=False
        )


def affinities(features: Tensor) -> Tensor:
    """(n, n) cosines of (n, ...) features, the diagonal masked."""
    cosines = gram(unit(widened(features.flatten(1))))
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    return cosines.masked_fill(own, -torch.inf)


def _logits(step: Step) -> tuple[Any, Any]:
    counted = counted_rows(step)
    return step.logits[counted], dense_logits(answers_of(step), step.logits)[counted]
