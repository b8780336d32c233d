"""``Distiller``'s arguments: whether they fit, and the optimizer that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

__all__ = ["Optimizers", "check_arguments", "optimizer_of"]

Optimizers = Callable[[Iterable[nn.Parameter]], Optimizer]


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


def check_arguments(
    student: object, objective: object, amp: object, accumulate: int, clip_norm: float | None, options: dict[str, Any]
) -> None:
    """Raises ``TypeError`` or ``ValueError``, naming what was passed and what was wanted."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
    if objective is not None and not callable(objective):
        raise TypeError(f"objective must be a function of a Step, got {type(objective).__name__}")
    if objective is not None and options:
        raise TypeError(f"{', '.join(sorted(options))}: KD's options go without an objective of one's own")
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be torch.bfloat16 or torch.float16, got {amp}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
