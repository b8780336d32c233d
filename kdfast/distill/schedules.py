"""Learning rates over a run: each is a function that makes a scheduler, which moves at every optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Schedule", "constant", "cosine", "inverse_decay", "schedule_of"]

# (optimizer, steps per epoch, epochs) to a scheduler
Schedule = Callable[[Optimizer, int, int], Any]


def constant(optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
    """The optimizer's own rate throughout."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
    """Half a cosine from the optimizer's rate to 0 (Loshchilov & Hutter, 2017).

    A run that goes on with other ``epochs`` follows their cosine: the number of steps is no part of its state.
    """
    steps = max(1, steps_per_epoch * epochs)
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps)))


def inverse_decay(decay: float) -> Schedule:
    """``lr / (1 + decay * epoch)``, with epochs from 0.

    Raises:
        ValueError: ``decay`` is negative.
    """
    if decay < 0:
        raise ValueError(f"decay must not be negative, got {decay}")

    def make(optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1.0 / (1.0 + decay * (step // steps_per_epoch)))

    return make


def schedule_of(schedule: str | Schedule) -> Schedule:
    """By its name, or as it is. Raises ``ValueError`` for another name, ``TypeError`` for what is not a function."""
    named: dict[str, Schedule] = {"constant": constant, "cosine": cosine}
    if isinstance(schedule, str):
        if schedule not in named:
            raise ValueError(f"schedule must be one of {', '.join(named)}, or a function, got {schedule!r}")
        return named[schedule]
    if not callable(schedule):
        raise TypeError(
            "schedule must be a name or a function (optimizer, steps_per_epoch, epochs) -> scheduler, "
            f"got {type(schedule).__name__}"
        )
    return schedule
