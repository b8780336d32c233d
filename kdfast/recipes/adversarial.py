"""Adversarial distillation: a discriminator that tells student from teacher, and a student that deceives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kdfast.distill.step import Step
from kdfast.objectives._vectors import mean_of
from kdfast.recipes._rows import answers_of, counted_rows, dense_logits, wide

__all__ = ["Adversarial", "discriminator"]

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
