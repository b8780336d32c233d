"""The optimizer of a run, and its learning rate: a schedule makes a scheduler, which moves at every optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Optimizers", "Schedule", "constant", "cosine", "inverse_decay", "optimizer_of", "schedule_of"]

# (optimizer, steps per epoch, epochs) to a scheduler
Schedule = Callable[[Optimizer, int, int], Any]
Optimizers = Callable[[Iterable[nn.Parameter]], Optimizer]


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


def optimizer_of(
    optimizer: Optimizers | Optimizer | None, lr: float, student: nn.Module, parameters: list[nn.Parameter]
) -> Optimizer:
    """One of ``parameters``, the student's and the objective's that are trained: made, or as it is.

    Raises:
        ValueError: one that exists lacks some of the student's.
    """
    if not isinstance(optimizer, Optimizer):
        return AdamW(parameters, lr) if optimizer is None else optimizer(parameters)
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    missing = [x for x in parameters if id(x) not in held]
    ours = {id(x) for x in student.parameters()}
    lacking = sum(id(x) in ours for x in missing)
    if lacking:
        raise ValueError(
            f"{lacking} trainable parameters of the student are not the optimizer's: give it all of them, or freeze "
            "these"
        )
    if missing:
        optimizer.add_param_group({"params": missing})
    return optimizer
