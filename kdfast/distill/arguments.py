"""The arguments of ``Distiller`` and of ``Distiller.fit``, and checks of their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdfast.distill.metrics import Metrics, is_function
from kdfast.distill.state import Record

__all__ = ["FitOptions", "check_arguments"]


def check_arguments(
    student: object, objective: object, amp: object, accumulate: int, clip_norm: float | None, options: dict[str, Any]
) -> None:
    """Check arguments of ``Distiller``. Raises ``TypeError`` or ``ValueError`` with what was passed and wanted."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
    if objective is not None and not callable(objective):
        raise TypeError(f"objective must be a function of a Step, got {type(objective).__name__}")
    if objective is not None and options:
        raise TypeError(f"{', '.join(sorted(options))}: KD's options do not go with another objective")
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be torch.bfloat16 or torch.float16, got {amp}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")


@dataclass(frozen=True)
class FitOptions:
    """The options of ``Distiller.fit``, which describes them."""

    epochs: int
    eval_every: int
    patience: int | None
    monitor: str
    metrics: Any
    checkpoint_every: int | None
    log_every: int
    resume: bool
    progress: bool
    on_epoch: Callable[[Record], object] | None

    def check(self, evaluates: bool) -> None:
        """Check the options of a run that ``evaluates`` its student, or does not.

        Raises:
            ValueError: a number that is not positive, patience without anything to monitor, or an unknown metric.
        """
        for name in ("epochs", "eval_every", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.patience is not None and not evaluates and self.monitor != "loss":
            raise ValueError('patience needs an eval_loader, or monitor="loss", the loss of training')
        if evaluates and not is_function(self.metrics):
            Metrics(self.metrics)
