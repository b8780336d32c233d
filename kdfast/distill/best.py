"""The best student so far, and how long ago it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kdfast.distill import parallel
from kdfast.distill.checkpoint import BEST, copy_of, load, restore, save

__all__ = ["Best", "monitored"]

LESS_IS_BETTER = ("loss", "cross_entropy", "ece")


class Best:
    """Keeps the student whose ``monitor`` is best: in ``folder``, or in memory where there is none.

    Args:
        student: whose weights.
        monitor: a name in the epochs' records. More is better, but for loss, cross_entropy and ece, and where a minus
            comes before the name.
        patience: evaluations without a better one until training stops. If None it does not, and memory holds nothing.
        folder: of the run.
    """

    def __init__(self, student: nn.Module, monitor: str, patience: int | None, folder: Path | None) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self._student, self._patience = student, patience
        self._name = monitor.removeprefix("-")
        self._less = monitor.startswith("-") or monitor in LESS_IS_BETTER
        self._path = None if folder is None else folder / BEST
        self._kept: Any = None
        self.value: float | None = None
        self.stale = 0

    def offer(self, record: dict[str, Any]) -> None:
        """Look at an evaluation. Raises ``ValueError`` where it lacks the monitored number."""
        if self._patience is None and self._name not in record:
            return
        found = monitored(record, self._name)
        value = -found if self._less else found
        self.stale += 1
        if value == value and (self.value is None or value > self.value):
            self.value, self.stale = value, 0
            self._keep(record)

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self.stale >= self._patience

    def restore(self) -> None:
        """Make the student the best one again, where training is stopped early."""
        if self._patience is None or self.value is None:
            return
        if self._path is None:
            self._student.load_state_dict(self._kept)
        else:
            parallel.wait()
            restore("student", self._student, load(self._path)["student"], self._path)

    def _keep(self, record: dict[str, Any]) -> None:
        if self._path is None:
            self._kept = copy_of(self._student.state_dict()) if self._patience is not None else None
        elif parallel.is_first():
            save(self._path, {"student": self._student.state_dict(), "record": record})

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.stale = state["value"], state["stale"]


def monitored(record: dict[str, Any], monitor: str) -> float:
    """The number of that name, whose minus is not part of it. Raises ``ValueError`` where the record lacks it."""
    name = monitor.removeprefix("-")
    if name not in record:
        raise ValueError(f"monitor {name!r} is none of {', '.join(record)}")
    return float(record[name])
