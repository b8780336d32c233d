"""Temperatures, and weights, of ``KD`` that change: from row to row, and over the training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.step import Step
from kdfast.recipes._inputs import counted_rows, teacher_logits, widened

__all__ = ["anneal", "entropy_temperature", "focal_temperature", "ramp_up", "temperature_of_entropy"]


# ---- from row to row ------------------------------------------------------------------------------------------------


def focal_temperature(base: float, beta: float, gamma: float = 2.0) -> Callable[[Step], Tensor]:
    """Make a function that gives each row a temperature, lower where the student's logits are far from the teacher's::

        T_i = base + beta (mean(w) - w_i),   w_i = (1 - cos(z_s, z_t))^gamma

        KD(temperature=focal_temperature(4.0, 0.9))

    Source: TextBrewer's ``flsw`` (Yang et al. 2020). Here the mean is over the rows that count. Since w is at most
    ``2**gamma``, ``base`` must exceed ``beta * 2**gamma``, so that every temperature is positive.

    Raises:
        ValueError: ``beta`` or ``gamma`` is negative, or ``base`` is too small.
    """
    if not (beta >= 0.0 and gamma >= 0.0 and base > beta * 2.0**gamma):
        raise ValueError(f"base must exceed beta * 2**gamma, got base={base}, beta={beta} and gamma={gamma}")

    def temperature(step: Step) -> Tensor:
        teacher = teacher_logits(step)
        distance = 1.0 - F.cosine_similarity(widened(step.logits.detach()), widened(teacher), dim=-1)
        weight = distance.clamp(min=0.0) ** gamma
        counted = counted_rows(step)
        mean = torch.where(counted, weight, 0.0).sum() / counted.sum().clamp(min=1)
        return base + beta * (mean - weight)

    return temperature


def entropy_temperature(share: float, *, low: float = 0.25, high: float = 32.0) -> Callable[[Step], Tensor]:
    """Make a function that gives each row the temperature at which the teacher's entropy is ``share`` of log V::

        KD(temperature=entropy_temperature(0.2))

    V is the number of classes. So all rows are equally uncertain: a confident row is softened until its other classes
    show, an uncertain one is sharpened. No paper has this; ``temperature_of_entropy`` computes it.

    Args:
        share: of the largest possible entropy, in (0, 1).
        low, high: bounds of the temperature.

    Raises:
        ValueError: ``share`` is not in (0, 1), or the bounds are not 0 < low < high.
    """
    _check(share, low, high)
    return lambda step: temperature_of_entropy(teacher_logits(step), share, low=low, high=high)


@torch.no_grad()
def temperature_of_entropy(logits: Tensor, share: float, *, low: float = 0.25, high: float = 32.0) -> Tensor:
    """The temperature T of each row with H(softmax(z / T)) = share * log(finite columns), by bisection.

    The entropy rises with T (its derivative is the variance of z over T^3), so there is one solution; a row that has
    none within the bounds gets the nearer bound.

    Args:
        logits: (..., V).
        share: of the largest possible entropy, in (0, 1).
        low, high: bounds of the temperature.

    Returns:
        (...) temperatures in [low, high].

    Raises:
        ValueError: ``share`` is not in (0, 1), or the bounds are not 0 < low < high.
    """
    _check(share, low, high)
    logits = widened(logits)
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
    """Make a function that moves a number from ``start`` to ``end`` over the training::

        KD(temperature=anneal(8.0, 1.0))

    Annealing KD, Jafari et al. 2021. With x the share of all optimiser steps that is done, the number is
    ``start + (end - start) * x``, or for shape "cosine" ``end + (start - end) * (1 + cos(pi x)) / 2``, which changes
    slowly at both ends.

    Raises:
        ValueError: ``shape`` is neither "linear" nor "cosine".
    """
    if shape not in ("linear", "cosine"):
        raise ValueError(f'shape must be "linear" or "cosine", got {shape!r}')
    if shape == "linear":
        return lambda step: start + (end - start) * step.progress
    return lambda step: end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step.progress))


def ramp_up(end: float, share: float = 0.2) -> Callable[[Step], float]:
    """Make a function that raises a weight from nearly 0 to ``end``: ``KD(kd_weight=ramp_up(1.0))``.

    The weight is ``end * exp(-5 (1 - x)^2)`` with ``x = min(1, progress / share)``, and ``progress`` the share of all
    optimiser steps that is done. Source: Laine & Aila 2017, for teachers that still learn themselves, such as that of
    ``self_distillation``.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return lambda step: end * math.exp(-5.0 * (1.0 - min(1.0, step.progress / share)) ** 2)
