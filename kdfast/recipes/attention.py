"""Attention: which rows, and which classes of a row, the divergence looks at most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.distill.objective import teacher_of
from kdfast.distill.step import Step
from kdfast.objectives._rows import PairedRows
from kdfast.recipes._rows import answers_of, counted_rows, dense_logits, wide
from kdfast.recipes.hard_examples import row_losses

__all__ = ["ClassAttention", "class_attention", "confidence", "disagreement", "sample_attention"]


def sample_attention(score: Callable[[Step], Tensor], *, temperature: float = 1.0) -> Callable[[Step], Tensor]:
    """``n softmax_i(score_i / temperature)`` over the n rows that count.

    ``KD(row_weight=sample_attention(confidence))``. The weights' mean is 1: attention moves the loss between rows and
    leaves its scale.

    Args:
        score: of the step's rows, (...): ``confidence``, ``disagreement``, or one's own.
        temperature: towards 0 the best row takes all; large ones weigh all rows alike.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def weights(step: Step) -> Tensor:
        counted = counted_rows(step)
        scores = score(step).detach()
        if scores.shape != counted.shape:
            raise ValueError(f"scores must be one per row, {tuple(counted.shape)}, got {tuple(scores.shape)}")
        logits = (scores / temperature).masked_fill(~counted, -torch.inf).flatten()
        share = torch.where(counted.flatten(), logits.softmax(0), 0.0)
        return (share * counted.sum()).view(counted.shape)

    return weights


def confidence(step: Step) -> Tensor:
    """Minus the teacher's entropy, in nats: rows of which it is sure come first."""
    log_p = wide(dense_logits(answers_of(step), step.logits)).log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def disagreement(step: Step) -> Tensor:
    """KL(teacher || student) of each row, in nats: rows that the student has yet to learn come first."""
    return row_losses(step, by="kd")


class ClassAttention:
    """A divergence whose classes have weights, with p the teacher's and q the student's distribution at T::

        T^2 mean_i sum_c w_ic (p_ic log(p_ic / q_ic) - p_ic + q_ic)

    The article multiplies the student's probabilities by the weights, after which they are no distribution. Weighting
    the terms of KL alone, ``sum_c w_c p_c log(p_c / q_c)``, is not enough: its optimum is q proportional to w p. With
    the two linear terms (the generalised KL of Csiszar 1991, class by class) every class's part is 0 or more, and 0
    only at q = p, whatever the weights. With all of them 1 it is KL, since p and q both sum to 1.

    Args:
        weights: (V,), or a function of the step that gives (..., V) or (V,), such as ``class_attention()``.
        temperature: T, of both.
        keep_optimum: False leaves the linear terms out, for weights that are meant to change the optimum.

    Raises:
        ValueError: weights of another shape, or negative ones given as a tensor.
    """

    def __init__(
        self, weights: Tensor | Callable[[Step], Tensor], *, temperature: float = 2.0, keep_optimum: bool = True
    ) -> None:
        if isinstance(weights, Tensor) and bool((weights < 0).any()):
            raise ValueError(f"weights of classes must not be negative, got {float(weights.min())}")
        self.weights, self.temperature, self.keep_optimum = weights, temperature, keep_optimum

    def __call__(self, step: Step) -> Tensor:
        answers_of(step)
        tau, counted = self.temperature, counted_rows(step)
        rows = PairedRows(step.logits, teacher_of(step), None, temperature=tau, row_weight=counted)
        weights = (self.weights(step) if callable(self.weights) else self.weights).detach().to(rows.student.device)
        if weights.shape not in (step.logits.shape, step.logits.shape[-1:]):
            raise ValueError(
                f"weights of classes must be {tuple(step.logits.shape[-1:])} or {tuple(step.logits.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        log_p, log_q = rows.teacher_log_probs, rows.student_log_probs
        p = log_p.exp()
        terms = p * torch.where(p > 0.0, log_p - log_q, 0.0)
        if self.keep_optimum:
            terms = terms - p + log_q.exp()
        return tau**2 * rows.reduce((rows.select(weights.expand(step.logits.shape)) * terms).sum(-1))


def class_attention(temperature: float = 1.0) -> Callable[[Step], Tensor]:
    """``V softmax(z_t / temperature)`` of each row: attention to the classes that the teacher takes into account.

    Raises ``ValueError`` for a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def weights(step: Step) -> Tensor:
        teacher = wide(dense_logits(answers_of(step), step.logits))
        return (teacher / temperature).softmax(-1) * teacher.shape[-1]

    return weights
