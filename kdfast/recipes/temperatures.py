"""Options of ``KD`` that change: over the training, and from row to row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.step import Step
from kdfast.recipes._inputs import answers_of, counted_rows, dense_logits, wide

__all__ = ["anneal", "entropy_temperature", "focal_temperature", "ramp_up", "temperature_of_entropy"]


# ---- from row to row ------------------------------------------------------------------------------------------------


def focal_temperature(base: float, beta: float, gamma: float = 2.0) -> Callable[[Step], Tensor]:
    """Cooler where the student is far from the teacher, hotter where it is close::

        T_i = base + beta (mean(w) - w_i),   w_i = (1 - cos(z_s, z_t))^gamma

    Source: TextBrewer's ``flsw`` (Yang et al. 2020). Here rows that do not count have no part in the mean, and
    ``w`` is at most ``2**gamma``, so ``base > beta 2**gamma`` is asked for: a temperature stays positive.

    Raises:
        ValueError: numbers under which a temperature could be 0 or less.
    """
    if not (beta >= 0.0 and gamma >= 0.0 and base > beta * 2.0**gamma):
        raise ValueError(f"base must exceed beta * 2**gamma, got base={base}, beta={beta} and gamma={gamma}")

    def temperature(step: Step) -> Tensor:
        teacher = dense_logits(answers_of(step), step.logits)
        distance = 1.0 - F.cosine_similarity(wide(step.logits.detach()), wide(teacher), dim=-1)
        weight = distance.clamp(min=0.0) ** gamma
        counted = counted_rows(step)
        mean = torch.where(counted, weight, 0.0).sum() / counted.sum().clamp(min=1)
        return base + beta * (mean - weight)

    return temperature


def entropy_temperature(share: float, *, low: float = 0.25, high: float = 32.0) -> Callable[[Step], Tensor]:
    """The temperature at which each row of the teacher is equally uncertain: has ``share`` of the entropy log V.

    A confident row is heated until its other classes show, an uncertain one is cooled. kdfast's own; see
    ``temperature_of_entropy``.

    Raises:
        ValueError: a share that is not in (0, 1), or bounds out of order.
    """
    _check(share, low, high)
    return lambda step: temperature_of_entropy(dense_logits(answers_of(step), step.logits), share, low=low, high=high)


@torch.no_grad()
def temperature_of_entropy(logits: Tensor, share: float, *, low: float = 0.25, high: float = 32.0) -> Tensor:
    """(...) T in [low, high] with H(softmax(z / T)) = share * log(finite columns), for (..., V) logits.

    The entropy rises with T (its derivative is the variance of z over T^3), so bisection finds the only solution; a
    row that has none within the bounds gets the nearer bound.
    """
    _check(share, low, high)
    logits = wide(logits)
    target = share * logits.isfinite().sum(-1).to(logits).log()
    below, above = torch.full_like(target, low), torch.full_like(target, high)
    for _ in range(50):
        middle = 0.5 * (below + above)
        cold = _entropy(logits / middle[..., None]) < target
        below, above = torch.where(cold, middle, below), torch.where(cold, above, middle)
    return above


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def _check(share: float, low: float, high: float) -> None:
    if not (0.0 < share < 1.0 and 0.0 < low < high):
        raise ValueError(f"share must be in (0, 1) and 0 < low < high, got share={share}, low={low} and high={high}")


# ---- over the training ----------------------------------------------------------------------------------------------


def anneal(start: float, end: float, shape: str = "linear") -> Callable[[Step], float]:
    """From ``start`` to ``end``: ``KD(temperature=anneal(8.0, 1.0))`` (annealing KD, Jafari et al. 2021).

    With x the share of all optimiser steps that is done, ``start + (end - start) * x``, or for shape "cosine"
    ``end + (start - end) * (1 + cos(pi x)) / 2``, which is slow at both ends.

    Raises:
        ValueError: another shape.
    """
    if shape not in ("linear", "cosine"):
        raise ValueError(f'shape must be "linear" or "cosine", got {shape!r}')
    if shape == "linear":
        return lambda step: start + (end - start) * step.progress
    return lambda step: end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step.progress))


def ramp_up(end: float, share: float = 0.2) -> Callable[[Step], float]:
    """``end * exp(-5 (1 - x)^2)``, x = progress / share, at most 1: the weight of a teacher that has yet to learn.

    Source: Laine & Aila 2017, for consistency losses such as ``self_distillation``'s.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return lambda step: end * math.exp(-5.0 * (1.0 - min(1.0, step.progress / share)) ** 2)
