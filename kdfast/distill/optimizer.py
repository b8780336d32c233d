"""The optimizer of a run and its schedule, which sets the learning rate of each optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Optimizers", "Schedule", "constant", "cosine", "inverse_decay", "optimizer_of", "schedule_of"]

LEARNING_RATE = 1e-3  # of AdamW, if no other is given

# A function (optimizer, steps_per_epoch, epochs) that returns one of PyTorch's schedulers, which moves at every step.
Schedule = Callable[[Optimizer, int, int], Any]
Optimizers = Callable[[Iterable[nn.Parameter]], Optimizer]


def constant(optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
    """A schedule that keeps the optimizer's learning rate throughout. Returns PyTorch's scheduler."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
    """A schedule that decays the learning rate to 0 along half a cosine (Loshchilov & Hutter, 2017)::

        lr / 2 * (1 + cos(pi * step / (steps_per_epoch * epochs)))

    Returns PyTorch's scheduler. A run that resumes with other ``epochs`` follows the cosine of the new number, for the
    number of steps is not part of the scheduler's state.
    """
    steps = max(1, steps_per_epoch * epochs)
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps)))


def inverse_decay(decay: float) -> Schedule:
    """Make a schedule whose learning rate is ``lr / (1 + decay * epoch)``, with epochs from 0.

    Raises:
        ValueError: ``decay`` is negative.
    """
    if decay < 0:
        raise ValueError(f"decay must not be negative, got {decay}")

    def make(optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1.0 / (1.0 + decay * (step // steps_per_epoch)))

    return make


def schedule_of(schedule: str | Schedule) -> Schedule:
    """The schedule with that name; a function is returned as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a function.
    """
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
    """Make the optimizer of ``parameters``, or add to an existing one what it lacks of the objective's.

    Args:
        optimizer: a function of the parameters, an optimizer, or None for AdamW.
        lr: AdamW's learning rate.
        student: the student.
        parameters: the parameters of student and objective that are trained.

    Raises:
        TypeError: no optimizer, and no function that makes one.
        ValueError: an existing optimizer lacks trainable parameters of the student; ``lr`` is given besides one.
    """
    if optimizer is None:
        return AdamW(parameters, lr)
    if not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise TypeError(
            f"optimizer must be a function of the parameters, such as functools.partial(torch.optim.Adam, lr={lr}), or "
            f"an optimizer, got {optimizer!r}"
        )
    if lr != LEARNING_RATE:
        raise ValueError(
            f"lr={lr} is of AdamW, and there is an optimizer besides: give the rate to that one, as in "
            f"functools.partial(torch.optim.SGD, lr={lr})"
        )
    if not isinstance(optimizer, Optimizer):
        return optimizer(parameters)
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
