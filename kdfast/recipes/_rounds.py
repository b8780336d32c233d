"""One student, trained again and again: what recipes of several rounds have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kdfast.distill.distiller import Distiller
from kdfast.distill.step import Objective

__all__ = ["History", "Rounds", "check_options"]

History = list[dict[str, Any]]


class Rounds:
    """Distillers of one student. They share an optimizer, whose rate begins anew each round, as its schedule does.

    A ``folder`` has one per round inside, so a recipe that was stopped goes on in the round where it was.
    """

    def __init__(self, student: nn.Module, *, folder: str | Path | None = None, **options: Any) -> None:
        check_options(options)
        self.student, self._folder, self._options = student, folder, options
        self._count = 0

    def next(self, teacher: Any, objective: Objective) -> Distiller:
        """The distiller of the next round."""
        self._count += 1
        folder = None if self._folder is None else Path(self._folder) / f"round-{self._count}"
        distiller = Distiller(self.student, teacher, objective=objective, folder=folder, **self._options)
        self._options["optimizer"] = distiller.optimizer
        return distiller


def check_options(options: dict[str, Any]) -> None:
    """Raises ``TypeError`` for an optimizer that exists already: it is of one model, and there are several."""
    if isinstance(options.get("optimizer"), Optimizer):
        raise TypeError("optimizer must be a function that makes one of the parameters here, got an optimizer")
