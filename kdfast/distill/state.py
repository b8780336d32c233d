"""The state of a run: its counters, its place in the loader's epoch, and the random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

__all__ = ["Position", "Record", "TrainState", "random_state", "set_random_state"]

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


class Position:
    """A place in a loader's epoch, from which a run resumes with the very batch that comes next.

    If the loader or its sampler has a ``state_dict``, as ``kdfast.cache.ElasticSampler`` has, that restores the place.
    Otherwise the epoch starts over from the random state that it began with, and the batches that were consumed are
    read and skipped.

    Args:
        loader: a ``DataLoader``, or any iterable of batches.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        batches, samples = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
        holders: list[Any] = [loader, batches, samples, getattr(batches, "sampler", None)]
        self._loader, self._holders = loader, holders
        self._stateful = next((x for x in holders if hasattr(x, "state_dict") and hasattr(x, "load_state_dict")), None)
        found = [getattr(x, "generator", None) for x in holders]
        self.generators = list({id(x): x for x in found if isinstance(x, torch.Generator)}.values())
        self._began: dict[str, Any] = {}
        self._consumed = self._skip = 0

    def require_exact(self) -> None:
        """Raise ``ValueError`` if an epoch cannot be repeated: persistent workers keep random states of their own."""
        if self._stateful is None and getattr(self._loader, "persistent_workers", False):
            raise ValueError(
                "a run with a folder cannot resume exactly with persistent_workers=True: give the loader "
                "persistent_workers=False, or a sampler with a state_dict (kdfast.cache.ElasticSampler)"
            )

    def batches(self, epoch: int) -> Iterator[Any]:
        """Iterate over an epoch's batches; after ``load_state_dict``, over those that remain. ``consume`` each.

        Raises:
            ValueError: the loader has no batch, or fewer than were consumed.
        """
        for holder in self._holders:
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        skip, self._skip = self._skip, 0
        batches = self._fast_forward(skip) if skip else self._begin()
        empty = not skip
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"the loader is empty in epoch {epoch + 1}: an iterator gives its batches only once")

    def _begin(self) -> Iterator[Any]:
        self._began = random_state(self.generators)
        return iter(self._loader)

    def _fast_forward(self, skip: int) -> Iterator[Any]:
        here = random_state(self.generators)
        if self._stateful is None:
            set_random_state(self._began, self.generators)
        batches = iter(self._loader)
        skipped = sum(1 for _ in islice(batches, skip)) if self._stateful is None else skip
        _check_skipped(skipped, skip)
        set_random_state(here, self.generators)
        return batches

    def consume(self, count: int) -> None:
        """Count batches that have been trained on."""
        self._consumed += count
        for _ in range(count if hasattr(self._stateful, "step") else 0):
            self._stateful.step()  # type: ignore[union-attr]

    def end_epoch(self) -> None:
        """Reset the count: every batch of the epoch has been trained on."""
        self._consumed = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of batches consumed, the random state at the epoch's start, and the sampler's own state."""
        own = None if self._stateful is None else self._stateful.state_dict()
        return {"consumed": self._consumed, "began": self._began, "own": own}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the state of ``state_dict`` is no place in this loader."""
        if (state["own"] is None) != (self._stateful is None):
            raise ValueError("of the two loaders' samplers one has a state_dict, the other has none")
        if self._stateful is None and hasattr(self._loader, "__len__"):
            _check_skipped(min(len(self._loader), state["consumed"]), state["consumed"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to the place of ``state_dict``. Raises ``ValueError`` if it is none of this loader."""
        self.check_state(state)
        self._consumed = self._skip = state["consumed"]
        self._began = state["began"]
        if self._stateful is not None:
            self._stateful.load_state_dict(state["own"])


def _check_skipped(skipped: int, trained: int) -> None:
    if skipped < trained:
        raise ValueError(f"the loader has {skipped} batches, and {trained} were trained on: it is another one")


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
