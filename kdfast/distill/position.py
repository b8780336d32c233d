"""Where in a loader's epoch training is, to go on with the very batch that comes next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from kdfast.distill.random_state import random_state, set_random_state

__all__ = ["Position"]


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
        self._consumed = self._behind = 0

    def require_exact(self) -> None:
        """Raises ``ValueError`` where an epoch cannot be begun again: persistent workers go on with their numbers."""
        if self._stateful is None and getattr(self._loader, "persistent_workers", False):
            raise ValueError(
                "a run with a folder cannot go on exactly with persistent_workers=True: give the loader "
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
        behind, self._behind = self._behind, 0
        batches = self._go_on(behind) if behind else self._begin()
        empty = not behind
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"the loader is empty in epoch {epoch + 1}: an iterator gives its batches only once")

    def _begin(self) -> Iterator[Any]:
        self._began = random_state(self.generators)
        return iter(self._loader)

    def _go_on(self, behind: int) -> Iterator[Any]:
        here = random_state(self.generators)
        if self._stateful is None:
            set_random_state(self._began, self.generators)
        batches = iter(self._loader)
        skipped = sum(1 for _ in islice(batches, behind)) if self._stateful is None else behind
        if skipped < behind:
            raise ValueError(f"the loader has {skipped} batches, and {behind} were trained on: it is another one")
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
        self._consumed = self._behind = state["consumed"]
        self._began = state["began"]
        if self._stateful is not None:
            self._stateful.load_state_dict(state["own"])
