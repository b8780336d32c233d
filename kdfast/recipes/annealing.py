"""Numbers that change over the training: temperatures and weights by the share of it that is done."""

from __future__ import annotations

import math
from collections.abc import Callable

from kdfast.distill.step import Step

__all__ = ["anneal", "ramp_up"]


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
