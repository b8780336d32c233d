"""One worker of ``ray_capture``: the teacher, and what it is given of a Ray dataset."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from re import sub
from threading import Event
from typing import Any

from ray.data import DataIterator

from kdfast.cache.capture.capture import CaptureReport, capture
from kdfast.cache.capture.ranks import Ranks
from kdfast.cache.capture.ray_batches import Columns, Replayed, Stoppable, Tensors, batches_of
from kdfast.cache.format.storage import LocalStorage, open_storage
from kdfast.cache.write.salvage import salvage

__all__ = ["Worker"]


class Worker:
    """A Ray actor of two threads: while one works, ``stop`` can be called.

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
        """Seal what earlier workers have left on this node, and make the teacher."""
        salvage(self._path, staging=self._options.get("staging"))
        self._teacher = self._make_teacher()

    def learn(self, blocks: DataIterator) -> CaptureReport:
        """Learn a table of prototypes from the first records of all, and store these, and with them the table."""
        return self._capture(Replayed(batches_of(blocks, self._batch_size)))

    def run(self, blocks: DataIterator) -> CaptureReport:
        """Store what this worker is given, until there is no more or ``stop`` is called. Either way it is sealed."""
        return self._capture(Stoppable(batches_of(blocks, self._batch_size), self._stopped))

    def stop(self) -> None:
        self._stopped.set()

    def _capture(self, batches: Iterable[Columns]) -> CaptureReport:
        return capture(self._teacher, Tensors(batches), self._path, **self._options)


def _writer_name(path: str, ranks: Ranks) -> str:
    """Shards of a URL grow in a folder of the node, where a worker of this number on another node does not see them."""
    if isinstance(open_storage(path), LocalStorage):
        return ranks.writer
    return f"{ranks.writer}_{sub('[^A-Za-z0-9]', '_', socket.gethostname())}"
