"""How far a run is, and what it has measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Record", "Tally"]

Record = dict[str, Any]


@dataclass
class Tally:
    """Counters of a run, and of the epoch that it is in."""

    epoch: int = 0  # complete ones
    step: int = 0  # of the optimiser
    stopped: bool = False  # by early stopping
    history: list[Record] = field(default_factory=list)
    updates: int = 0  # of this epoch
    loss: float = 0.0  # their sum
    last_loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    def count(self, loss: float, samples: int) -> None:
        """A step."""
        self.step += 1
        self.updates += 1
        self.loss, self.last_loss = self.loss + loss, loss
        self.samples += samples

    def end_epoch(self, record: Record) -> None:
        """Keep its record, and begin the next one."""
        self.history.append(record)
        self.epoch += 1
        self.updates, self.loss, self.samples, self.seconds = 0, 0.0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
