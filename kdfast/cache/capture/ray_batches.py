"""The batches of a Ray dataset, as a worker of ``ray_capture`` hands them to ``capture``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any, NamedTuple

import ray
import torch
from ray.data import DataIterator

__all__ = ["Columns", "Replayed", "Stoppable", "Tensors", "batches_of"]

Columns = dict[str, Any]  # arrays of as many rows
PATIENCE = 0.2  # seconds from ``stop`` to the end of a wait


def batches_of(blocks: DataIterator, size: int) -> Iterator[Columns]:
    """None spans two blocks, so that a batch is the same whoever gets the block, and after whichever other one."""
    whole: Any = None  # which the annotation of batch_size forgets
    for block in blocks.iter_batches(batch_size=whole, batch_format="numpy"):
        rows = max(map(len, block.values()), default=0)
        for first in range(0, rows, size):
            yield {name: column[first : first + size] for name, column in block.items()}


class Tensors:
    """Batches with numbers as tensors and everything else as lists."""

    def __init__(self, batches: Iterable[Columns]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Columns]:
        for batch in self._batches:
            yield {
                name: torch.tensor(column) if column.dtype.kind in "biuf" else column.tolist()
                for name, column in batch.items()
            }


class Replayed:
    """What the first pass takes, in every pass: read again, a dataset may come in another order.

    It is kept in Ray's object store, which moves to disk what does not fit.
    """

    def __init__(self, batches: Iterable[Columns]) -> None:
        self._batches = batches
        self._kept: list[Any] = []

    def __iter__(self) -> Iterator[Columns]:
        if self._kept:
            yield from map(ray.get, self._kept)
            return
        for batch in self._batches:
            self._kept.append(ray.put(batch))
            yield batch


class _End(NamedTuple):
    error: BaseException | None


class Stoppable:
    """Batches until ``stopped``, also in the middle of waiting for one: it may never come when a worker has died."""

    def __init__(self, batches: Iterable[Columns], stopped: Event) -> None:
        self._batches, self._stopped = batches, stopped

    def __iter__(self) -> Iterator[Columns]:
        ready: Queue[Columns | _End] = Queue(1)
        Thread(target=self._read, args=(ready,), daemon=True).start()
        while not self._stopped.is_set():
            try:
                item = ready.get(timeout=PATIENCE)
            except Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return

    def _read(self, ready: Queue[Columns | _End]) -> None:
        error = None
        try:
            for batch in self._batches:
                ready.put(batch)
        except BaseException as failure:
            error = failure
        ready.put(_End(error))
