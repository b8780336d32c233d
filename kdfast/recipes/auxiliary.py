"""Terms to add to KD: an adversarial one, and one that compares how the samples of a batch relate to one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kdfast.distill.step import Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.objectives._vectors import gram, mean_of, unit
from kdfast.recipes._inputs import counted_logits, widened

__all__ = ["Adversarial", "GraphAttention", "discriminator"]

# ---- adversarial ----------------------------------------------------------------------------------------------------


# Of log-probabilities, as in torch's BCELoss: a masked column's -inf would make D's logits NaN.
LOWEST = -100.0


class Adversarial(nn.Module):
    """A discriminator that tells student from teacher, and a student that deceives it: the sum of both losses::

        student:        -weight * mean log D(f_s)                            (D held constant)
        discriminator:  mean( -log D(f_t) - log(1 - D(f_s)) )                (f_s held constant)

    Source: Goodfellow et al. 2014, in its non-saturating form. The article's pseudo-code updates the discriminator
    only, so that nothing reaches the student. Use it beside KD::

        Distiller(student, teacher, objective=Combined(KD(), Adversarial(discriminator(10), weight=0.1)))

    Neither term has a gradient in the other's parameters. So one optimiser trains both networks, and D is saved in the
    checkpoints. A batch without a row that counts has the loss 0.

    Args:
        discriminator: D, a module from (n, ...) features to (n,) or (n, 1) logits of "this is the teacher".
        weight: of the student's term.
        features: a function of the step giving the student's and the teacher's (n, ...) features; their
            log-probabilities if None, so that D cannot tell them apart by a constant that a softmax does not see.

    Raises:
        ValueError: the weight is not positive, or D gives another number of logits.
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
        student, teacher = map(_log_probs, counted_logits(step)) if self.features is None else self.features(step)
        return self.weight * self.student_loss(student) + self.discriminator_loss(student, teacher)

    def student_loss(self, student: Tensor) -> Tensor:
        """``mean -log D(f_s)`` of (n, ...) student features, without a gradient for D."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        frozen |= {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        return mean_of(F.softplus(-_decision(functional_call(self.discriminator, frozen, (student,)), student)))

    def discriminator_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``mean -log D(f_t) - log(1 - D(f_s))`` of (n, ...) features, without a gradient for the student."""
        real = _decision(self.discriminator(teacher.detach()), teacher)
        fake = _decision(self.discriminator(student.detach()), student)
        return mean_of(F.softplus(-real)) + mean_of(F.softplus(fake))


def discriminator(width: int, hidden: int = 64) -> nn.Sequential:
    """A small network for ``Adversarial``, from (n, width) features to (n, 1) logits, with ``hidden`` units."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))


def _decision(logits: Tensor, features: Tensor) -> Tensor:
    if logits.shape not in ((len(features),), (len(features), 1)):
        raise ValueError(
            f"a discriminator gives one logit per sample, ({len(features)},) or ({len(features)}, 1), got "
            f"{tuple(logits.shape)}"
        )
    return widened(logits.flatten())


def _log_probs(logits: Tensor) -> Tensor:
    return widened(logits).log_softmax(-1).clamp(min=LOWEST)


# ---- the batch as a graph -------------------------------------------------------------------------------------------


class GraphAttention:
    """The KL divergence between the teacher's and the student's attention of a batch's samples to one another::

        a_ij = softmax_{j != i}( cos(f_i, f_j) / T ),   loss = mean_i KL(a_i of the teacher || a_i of the student)

    The samples are a graph whose edges are weighted by attention, as in a graph attention network (Velickovic et al.
    2018), but without parameters: learned attention of the student would have no counterpart in the teacher. The loss
    is that of CompRess (Koohpayegani et al. 2020) with the batch for anchors. It depends on the features' angles alone:
    rotating or scaling them changes nothing, and student and teacher may differ in width. Fewer than three samples, as
    the last batch of an epoch may have, give 0, since a single neighbour has all attention, whatever the features.

    Use it beside KD: ``Combined(KD(), GraphAttention(), weights=(1.0, 0.5))``.

    Args:
        temperature: T; a small one attends to few neighbours.
        features: a function of the step giving the student's and the teacher's (samples, ...) features; the logits of
            the rows that count if None.

    Raises:
        ValueError: the temperature is not positive, or the two have different numbers of samples.
    """

    def __init__(
        self, *, temperature: float = 0.1, features: Callable[[Step], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature, self.features = temperature, features

    def __call__(self, step: Step) -> Tensor:
        student, teacher = counted_logits(step) if self.features is None else self.features(step)
        if len(student) != len(teacher):
            raise ValueError(f"a graph is of the same samples, got {len(student)} and {len(teacher)}")
        if len(student) < 3:
            return widened(student[:0]).sum()
        return kd_loss(  # type: ignore[no-any-return]
            _affinities(student), _affinities(teacher.detach()), temperature=self.temperature, scale_by_t2=False
        )


def _affinities(features: Tensor) -> Tensor:
    """(n, n) cosines of (n, ...) features, the diagonal masked."""
    cosines = gram(unit(widened(features.flatten(1))))
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    return cosines.masked_fill(own, -torch.inf)
