"""One worker of ``ray_capture``: the teacher, and its batches of a Ray dataset."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Queue
from re import sub
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from ray.data import DataIterator

from kdfast.cache.capture.capture import capture
from kdfast.cache.capture.ranks import Ranks
from kdfast.cache.capture.report import CaptureReport
from kdfast.cache.capture.stream import Stream
from kdfast.cache.format.storage import LocalStorage, open_storage
from kdfast.cache.write.salvage import salvage

__all__ = ["Worker"]

ColumnBatch = dict[str, Any]  # a batch: an array per column of the dataset, all of one length
PATIENCE = 0.2  # seconds from ``stop`` to the end of a wait


class Worker:
    """A worker, as a Ray actor of two threads: ``stop`` can be called while the other one works.

    Args:
        make_teacher: called once, by ``prepare``.
        path: the cache, by a name that every node understands.
        ranks: this worker's number, and how many there are.
        batch_size: records that the teacher sees at once, at most.
        options: ``capture``'s.
    """

    def __init__(
        self, make_teacher: Callable[[], Any], path: str, ranks: Ranks, batch_size: int, options: dict[str, Any]
    ) -> None:
        self._make_teacher, self._path, self._batch_size = make_teacher, path, batch_size
        self._options = {**options, "writer": _writer_name(path, ranks), "progress": False}
        self._stopped = Event()

    def prepare(self) -> None:
        """Seal the shards that earlier workers have left on this node, and make the teacher."""
        salvage(self._path, staging=self._options.get("staging"))
        self._teacher = self._make_teacher()

    def learn(self, blocks: DataIterator) -> CaptureReport:
        """Let the codec learn from the first records of the dataset, and store these, and with them what it learned."""
        return self._capture(Stream(Tensors(batches_of(blocks, self._batch_size)), only_first=True))

    def run(self, blocks: DataIterator) -> CaptureReport:
        """Store this worker's part of the dataset, until it ends or ``stop`` is called; then seal the last shard."""
        return self._capture(Tensors(Stoppable(batches_of(blocks, self._batch_size), self._stopped)))

    def stop(self) -> None:
        """End ``run`` after its current batch."""
        self._stopped.set()

    def _capture(self, batches: Iterable[ColumnBatch]) -> CaptureReport:
        return capture(self._teacher, batches, self._path, **self._options)


def _writer_name(path: str, ranks: Ranks) -> str:
    """This worker's writer name. For a URL it has the host's: shards grow on the node, where no other one sees them."""
    if isinstance(open_storage(path), LocalStorage):
        return ranks.writer
    return f"{ranks.writer}_{sub('[^A-Za-z0-9]', '_', socket.gethostname())}"


# ---- batches --------------------------------------------------------------------------------------------------------


def batches_of(blocks: DataIterator, size: int) -> Iterator[ColumnBatch]:
    """Cut ``blocks`` into batches of at most ``size`` rows.

    Batches never cross block boundaries, so their contents do not depend on which worker reads a block, or when.
    """
    whole: Any = None  # which the annotation of batch_size forgets
    for block in blocks.iter_batches(batch_size=whole, batch_format="numpy"):
        rows = max(map(len, block.values()), default=0)
        for first in range(0, rows, size):
            yield {name: column[first : first + size] for name, column in block.items()}


class Tensors:
    """Batches whose columns of numbers are tensors and whose other columns are lists."""

    def __init__(self, batches: Iterable[ColumnBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[ColumnBatch]:
        for batch in self._batches:
            yield {
                name: torch.tensor(column) if column.dtype.kind in "biuf" else column.tolist()
                for name, column in batch.items()
            }


class _End(NamedTuple):
    error: BaseException | None


class Stoppable:
    """Batches until ``stopped`` is set, also while waiting for one: it may never come when a worker has died."""

    def __init__(self, batches: Iterable[ColumnBatch], stopped: Event) -> None:
        self._batches, self._stopped = batches, stopped

    def __iter__(self) -> Iterator[ColumnBatch]:
        ready: Queue[ColumnBatch | _End] = Queue(1)
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

    def _read(self, ready: Queue[ColumnBatch | _End]) -> None:
        error = None
        try:
            for batch in self._batches:
                ready.put(batch)
        except BaseException as failure:
            error = failure
        ready.put(_End(error))
