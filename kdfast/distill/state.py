"""The state of a run: its counters, and the random number generators."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

__all__ = ["Record", "TrainState", "random_state", "set_random_state"]

Record = dict[str, Any]


@dataclass
class TrainState:
    """How far a run is: its counters, and those of the epoch under way.

    Attributes:
        epoch: epochs completed.
        step: optimiser steps of the whole run.
        stopped: whether early stopping has ended the run.
        history: a record per completed epoch.
        updates: optimiser steps of this epoch.
        loss: sum of this epoch's losses, one per step.
        last_loss: loss of the last step.
        samples: samples of this epoch in this process.
        seconds: time that this epoch has taken.
    """

    epoch: int = 0
    step: int = 0
    stopped: bool = False
    history: list[Record] = field(default_factory=list)
    updates: int = 0
    loss: float = 0.0
    last_loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    def count(self, loss: float, samples: int) -> None:
        """Count an optimiser step with its loss and samples."""
        self.step += 1
        self.updates += 1
        self.loss, self.last_loss = self.loss + loss, loss
        self.samples += samples

    def end_epoch(self, record: Record) -> None:
        """Add the epoch's record to the history, and reset the epoch's counters."""
        self.history.append(record)
        self.epoch += 1
        self.updates, self.loss, self.samples, self.seconds = 0, 0.0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the attributes from ``state_dict``."""
        vars(self).update(state)


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The state of all random number generators, in types that ``torch.load`` reads with ``weights_only``.

    These are PyTorch's on the CPU and every GPU, Python's, NumPy's global one, and ``generators``.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (what a dataset uses is not for us to choose)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Restore the generators from ``random_state``. Raises ``ValueError`` for another number of ``generators``."""
    if len(state["generators"]) != len(generators):
        raise ValueError(
            f"the state is of {len(state['generators'])} generators of a loader, this one has {len(generators)}"
        )
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)
