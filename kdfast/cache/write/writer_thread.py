"""The thread that encodes and writes while the teacher computes."""

from __future__ import annotations

import threading
import weakref
from collections import deque

from kdfast.cache.write.builder import MAX_BLOCK_VALUES, ShardBuilder
from kdfast.cache.write.records import Record

__all__ = ["WriterThread"]

QUEUED_BLOCKS = 8


class WriterThread:
    """Hands records to a builder in the order they come, in a thread of its own.

    It queues at most ``QUEUED_BLOCKS`` blocks of records; ``put`` waits for room. When the builder fails the thread
    stops at that record, and the next ``put`` or ``drain`` raises what the builder raised. Each call after that
    retries first, and resumes where the thread stopped: once a full disk has room again, nothing is lost.
    """

    def __init__(self, builder: ShardBuilder, block_rows: int) -> None:
        self._state = _State(builder)
        self._most_rows = QUEUED_BLOCKS * block_rows
        self._thread: threading.Thread | None = None
        # The thread holds the state alone, so that a writer which is dropped unclosed does not keep it running.
        self._finalizer = weakref.finalize(self, self._state.stop)

    def put(self, record: Record) -> None:
        """Queue a record. Raises an error of the thread since the last call; the record is then not queued."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._state.run, name="kdfast-writer", daemon=True)
            self._thread.start()
        state = self._state
        with state.condition:
            state.try_again()
            state.condition.wait_for(lambda: state.error is not None or self._has_room(record))
            state.raise_error()
            state.waiting.append(record)
            state.rows += len(record.labels)
            state.values += record.labels.values.numel()
            state.condition.notify_all()

    def drain(self) -> None:
        """Wait until the builder has every record. Raises an error of the thread since the last call."""
        state = self._state
        with state.condition:
            state.try_again()
            state.condition.wait_for(lambda: state.error is not None or state.idle)
            state.raise_error()

    def stop(self) -> list[Record]:
        """End the thread after its current record. Returns the records that it has not given to the builder."""
        self._finalizer()
        if self._thread is not None:
            self._thread.join()
        return list(self._state.waiting)

    def _has_room(self, record: Record) -> bool:
        state = self._state
        if not state.waiting:
            return True  # even a record larger than the whole queue
        rows, values = len(record.labels), record.labels.values.numel()
        return state.rows + rows <= self._most_rows and state.values + values <= QUEUED_BLOCKS * MAX_BLOCK_VALUES


class _State:
    """The state that the thread shares with its callers. Every field is guarded by ``condition``."""

    def __init__(self, builder: ShardBuilder) -> None:
        self.condition = threading.Condition()
        self.waiting: deque[Record] = deque()
        self.rows = self.values = 0  # of those waiting
        self.error: BaseException | None = None  # not yet raised
        self._failed = self._retry = False  # the builder gets no record until a retry has succeeded
        self._busy = self._stopped = False
        self._builder = builder

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._busy or self._failed)

    def try_again(self) -> None:
        """Have the thread retry what failed, if its error has been raised already, and wait for the outcome."""
        if self._failed and self.error is None:
            self._retry = True
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.error is not None or not self._failed)

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        with self.condition:
            self._stopped = True
            self.condition.notify_all()

    def run(self) -> None:
        while self._take():
            error = None
            try:
                self._builder.advance()
            except BaseException as caught:
                error = caught
            with self.condition:
                self._busy, self._failed, self.error = False, error is not None, error
                self.condition.notify_all()

    def _take(self) -> bool:
        """Wait for work, and give the builder its next record. Returns False when the thread is to end."""
        with self.condition:
            self.condition.wait_for(lambda: self._stopped or self._retry or bool(self.waiting and not self._failed))
            if self._stopped:
                return False
            self._busy, self._retry = True, False
            if not self._failed:
                record = self.waiting.popleft()
                self.rows -= len(record.labels)
                self.values -= record.labels.values.numel()
                self._builder.push(record)
            return True
