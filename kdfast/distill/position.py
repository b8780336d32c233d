"""A place in a loader's epoch: from there a run resumes with the very batch that comes next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from kdfast.distill.state import random_state, set_random_state

__all__ = ["Position", "without_first"]


class Position:
    """A place in a loader's epoch, from which a run resumes with the very batch that comes next.

    If the loader or its sampler has a ``state_dict``, as ``kdfast.cache.ElasticSampler`` has, that restores the place.
    Otherwise the epoch starts over from the random state that it began with, and the batches that were consumed are
    skipped: by the sampler of a ``DataLoader`` on a map-style dataset, where that leaves the remaining batches as they
    would have been, else by reading them.

    Args:
        loader: a ``DataLoader``, or any iterable of batches.
        samples: a function giving the number of samples in a batch.
    """

    def __init__(self, loader: Iterable[Any], samples: Callable[[Any], int] = lambda batch: 0) -> None:
        self._samples_of: Callable[[Any], int] = samples
        batches, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
        holders: list[Any] = [loader, batches, sampler, getattr(batches, "sampler", None)]
        self._loader, self._holders = loader, holders
        self._stateful = next((x for x in holders if hasattr(x, "state_dict") and hasattr(x, "load_state_dict")), None)
        found = [getattr(x, "generator", None) for x in holders]
        self.generators = list({id(x): x for x in found if isinstance(x, torch.Generator)}.values())
        self._began: dict[str, Any] = {}
        self._consumed = self._skip = self._samples = self._skip_samples = 0

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
        batches = iter(self._loader) if self._stateful is not None else self._skipped(skip)
        set_random_state(here, self.generators)
        return batches

    def _skipped(self, skip: int) -> Iterator[Any]:
        set_random_state(self._began, self.generators)
        batches = without_first(self._loader, skip)
        if batches is None:
            set_random_state(self._began, self.generators)
            batches = iter(self._loader)
            self._read(batches, skip)
        return batches

    def _read(self, batches: Iterator[Any], skip: int) -> None:
        """Read batches that were trained on. Raises ``ValueError`` if there are fewer, or of other sizes."""
        skipped = samples = 0
        for batch in islice(batches, skip):
            skipped, samples = skipped + 1, samples + self._samples_of(batch)
        _check_skipped(skipped, skip)
        if self._skip_samples and samples != self._skip_samples:
            raise ValueError(
                f"the loader's first {skip} batches have {samples} samples, and {self._skip_samples} were trained on: "
                "it has another batch size. resume=False, or another folder, starts over"
            )

    def consume(self, batches: Sequence[Any]) -> None:
        """Count batches that have been trained on."""
        count = len(batches)
        self._consumed += count
        self._samples += sum(map(self._samples_of, batches))
        for _ in range(count if hasattr(self._stateful, "step") else 0):
            self._stateful.step()  # type: ignore[union-attr]

    def end_epoch(self) -> None:
        """Reset the count: every batch of the epoch has been trained on."""
        self._consumed = self._samples = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of batches consumed, the random state at the epoch's start, and the sampler's own state."""
        own = None if self._stateful is None else self._stateful.state_dict()
        return {"consumed": self._consumed, "samples": self._samples, "began": self._began, "own": own}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the state of ``state_dict`` is no place in this loader."""
        if (state["own"] is None) != (self._stateful is None):
            raise ValueError("of the two loaders' samplers one has a state_dict, the other has none")
        try:
            batches = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            return
        if self._stateful is None:
            _check_skipped(min(batches, state["consumed"]), state["consumed"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to the place of ``state_dict``. Raises ``ValueError`` if it is none of this loader."""
        self.check_state(state)
        self._consumed = self._skip = state["consumed"]
        self._samples = self._skip_samples = state.get("samples", 0)  # older states lack it
        self._began = state["began"]
        if self._stateful is not None:
            self._stateful.load_state_dict(state["own"])


def _check_skipped(skipped: int, trained: int) -> None:
    if skipped < trained:
        raise ValueError(f"the loader has {skipped} batches, and {trained} were trained on: it is another one")


class _Rest:
    """A sampler without what it gives first. The skipped part is drawn, and nothing is read for it."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self._sampler, self._skip = sampler, skip

    def __iter__(self) -> Iterator[Any]:
        self._items, self._started = iter(self._sampler), False
        return self

    def __next__(self) -> Any:
        self.start()
        return next(self._items)

    def start(self) -> bool:
        """Skip, once. Whether the sampler has drawn its random numbers at its first item, if it has any."""
        if self._started:
            return True
        self._started = True
        first = sum(1 for _ in islice(self._items, 1))
        drawn = random_state()
        _check_skipped(first + sum(1 for _ in islice(self._items, self._skip - 1)), self._skip)
        return _equal(drawn, random_state())


def without_first(loader: Any, skip: int) -> Iterator[Any] | None:
    """Iterate over a loader without its first ``skip`` batches, which its sampler skips: nothing is read for them.

    None where the remaining batches could be others than if those had been read: of other loaders than ``DataLoader``
    on a map-style dataset; where a sampler draws random numbers between the batches; where there are workers, whose
    random numbers reading a sample changes.

    Raises:
        ValueError: there are fewer batches.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if isinstance(loader.dataset, IterableDataset) or (loader.num_workers and _reading_draws(loader)):
        return None
    batched = loader.batch_sampler is not None
    rest = _Rest(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler, skip)
    # A copy with another sampler; DataLoader itself refuses to have it replaced.
    part = copy.copy(loader)
    object.__setattr__(part, "batch_sampler" if batched else "sampler", rest)
    batches = iter(part)  # with workers it asks for the first batches now
    return batches if rest.start() or loader.num_workers else None


def _reading_draws(loader: DataLoader[Any]) -> bool:
    """Whether reading a sample changes the state of a random number generator, as augmentations do."""
    generators = [x for x in (loader.generator, getattr(loader.sampler, "generator", None)) if x is not None]
    before = random_state(generators)
    try:
        index = next(iter(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler))
        drawn = random_state(generators)
        loader.dataset[index[0] if loader.batch_sampler is not None else index]
        return not _equal(drawn, random_state(generators))
    except Exception:  # whatever a dataset raises; it will raise it again when it is read
        return True
    finally:
        set_random_state(before, generators)


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = [(*x["cuda"], *x["generators"], x["torch"]) for x in (one, other)]
    same = all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    return same and one["python"] == other["python"] and one["numpy"] == other["numpy"]
