"""Where a run is: its counters, the place in the loader's epoch, and the random numbers."""

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


class Position:
    """A loader's batches from anywhere in an epoch.

    A sampler that knows its own place (``state_dict``, as ``kdfast.cache.ElasticSampler`` has it, or a loader of that
    kind) is asked for it. Otherwise the epoch is begun again with the random numbers that it began with, and the
    batches that were consumed are read and left out.
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
        """Raises ``ValueError`` where an epoch cannot be begun again: persistent workers go on with their numbers."""
        if self._stateful is None and getattr(self._loader, "persistent_workers", False):
            raise ValueError(
                "a run with a folder cannot resume exactly with persistent_workers=True: give the loader "
                "persistent_workers=False, or a sampler with a state_dict (kdfast.cache.ElasticSampler)"
            )

    def batches(self, epoch: int) -> Iterator[Any]:
        """Those of an epoch, or what is left of it after ``load_state_dict``. Call ``consume`` after each.

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
        if skipped < skip:
            raise ValueError(f"the loader has {skipped} batches, and {skip} were trained on: it is another one")
        set_random_state(here, self.generators)
        return batches

    def consume(self, count: int) -> None:
        """Some batches have been trained on."""
        self._consumed += count
        for _ in range(count if hasattr(self._stateful, "step") else 0):
            self._stateful.step()  # type: ignore[union-attr]

    def end_epoch(self) -> None:
        """All of them have been."""
        self._consumed = 0

    def state_dict(self) -> dict[str, Any]:
        own = None if self._stateful is None else self._stateful.state_dict()
        return {"consumed": self._consumed, "began": self._began, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ``ValueError`` where the loader is of another kind."""
        if (state["own"] is None) != (self._stateful is None):
            raise ValueError("of the two loaders' samplers one has a state_dict, the other has none")
        self._consumed = self._skip = state["consumed"]
        self._began = state["began"]
        if self._stateful is not None:
            self._stateful.load_state_dict(state["own"])


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """PyTorch's on the CPU and every GPU, Python's, NumPy's global one, and ``generators``'."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (what a dataset uses is not for us to choose)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Go on from ``random_state``. Raises ``ValueError`` if it was of another number of generators."""
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
