"""Terms to add to KD: an adversarial one, and one that compares how the samples of a batch relate to one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kdfast.distill.step import Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._vectors import gram, mean_of, unit, widened
from kdfast.recipes._inputs import answers_of, counted_rows, dense_logits, wide

__all__ = ["Adversarial", "GraphAttention", "discriminator"]

# ---- adversarial ----------------------------------------------------------------------------------------------------


# Of log-probabilities, as in torch's BCELoss: a masked column's -inf would make D's logits NaN.
LOWEST = -100.0


class Adversarial(nn.Module):
    """A generator's and a discriminator's loss (Goodfellow et al. 2014, in its non-saturating form)::

        student:        -weight * mean log D(f_s)                            (D held constant)
        discriminator:  mean( -log D(f_t) - log(1 - D(f_s)) )                (f_s held constant)

    The article's pseudo-code updates the discriminator only, so the student never hears of it. Use it beside KD::

        Distiller(student, teacher, objective=Combined(KD(), Adversarial(discriminator(10), weight=0.1)))

    It returns the sum of both. Each is blind to the other's parameters: the student's term leaves D's gradients as they
    are, and D's term the student's. So one optimiser trains both, and D is in the checkpoints.

    Args:
        discriminator: (n, ...) features to (n,) or (n, 1) logits of "this is the teacher".
        weight: lambda, of the student's term.
        features: of a step, the student's and the teacher's; their log-probabilities without, so that D cannot tell
            them by a constant that a softmax does not see.

    A batch without a row that counts has the loss 0.

    Raises:
        ValueError: a weight that is not positive, or a discriminator that gives something else.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        weight: float = 0.1,
        features: Callable[[Step], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        if not weight > 0.0:
            raise ValueError(f"weight must be positive, got {weight}: the student would not hear of the discriminator")
        self.discriminator, self.weight, self.features = discriminator, weight, features

    def forward(self, step: Step) -> Tensor:
        student, teacher = _log_probs(step) if self.features is None else self.features(step)
        return self.weight * self.student_loss(student) + self.discriminator_loss(student, teacher)

    def student_loss(self, student: Tensor) -> Tensor:
        """``mean -log D(f_s)``, without a gradient for D."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        frozen |= {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        return mean_of(F.softplus(-_verdict(functional_call(self.discriminator, frozen, (student,)), student)))

    def discriminator_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``mean -log D(f_t) - log(1 - D(f_s))``, without a gradient for the student."""
        real = _verdict(self.discriminator(teacher.detach()), teacher)
        fake = _verdict(self.discriminator(student.detach()), student)
        return mean_of(F.softplus(-real)) + mean_of(F.softplus(fake))


def discriminator(width: int, hidden: int = 64) -> nn.Sequential:
    """A small one, of (n, width) features."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))


def _verdict(logits: Tensor, features: Tensor) -> Tensor:
    if logits.shape not in ((len(features),), (len(features), 1)):
        raise ValueError(
            f"a discriminator gives one logit per sample, ({len(features)},) or ({len(features)}, 1), got "
            f"{tuple(logits.shape)}"
        )
    return wide(logits.flatten())


def _log_probs(step: Step) -> tuple[Any, Any]:
    counted = counted_rows(step)
    both = step.logits, dense_logits(answers_of(step), step.logits)
    return tuple(wide(x[counted]).log_softmax(-1).clamp(min=LOWEST) for x in both)  # type: ignore[return-value]


# ---- the batch as a graph -------------------------------------------------------------------------------------------


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
