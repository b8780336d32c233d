"""What a run of training was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdfast.distill.metrics import Metrics, is_function
from kdfast.distill.tally import Record

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """``Distiller.fit``'s options."""

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
        """Raises ``ValueError`` for numbers that are not positive, and for patience without anything to watch."""
        for name in ("epochs", "eval_every", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.patience is not None and not evaluates and self.monitor != "loss":
            raise ValueError('patience needs an eval_loader, or monitor="loss", the loss of training')
        if evaluates and not is_function(self.metrics):
            Metrics(self.metrics)
