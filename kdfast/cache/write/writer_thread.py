"""The thread that encodes and writes while the teacher computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from kdfast.cache.write.builder import MAX_BLOCK_VALUES, ShardBuilder
from kdfast.cache.write.records import Record

__all__ = ["Totals", "WriterThread"]

QUEUED_BLOCKS = 8
POLL_S = 0.05  # between two looks of a caller that waits, should nobody wake it

Job = Callable[[], None]


class Totals(NamedTuple):
    """How much has been queued since the writer was opened."""

    records: int = 0
    rows: int = 0
    values: int = 0

    def plus(self, record: Record) -> Totals:
        """These totals with one more record."""
        values = record.labels.values.numel()
        return Totals(self.records + 1, self.rows + len(record.labels), self.values + values)


class WriterThread:
    """Hands records to a builder in the order they come, in a thread of its own, which alone touches the builder.

    It queues at most ``QUEUED_BLOCKS`` blocks of records; ``put`` waits for room. When the builder fails the thread
    stops at that record, and the next ``put`` or ``drain`` raises what the builder raised. Each call after that
    retries first, and resumes where the thread stopped: once a full disk has room again, nothing is lost.

    ``KeyboardInterrupt`` may strike a caller between any two of its instructions. So there is no monitor that it could
    leave half changed: a record is queued by one ``append``, everything else is written by the thread alone (which no
    signal interrupts), and whoever waits looks again from time to time.
    """

    def __init__(self, builder: ShardBuilder, block_rows: int) -> None:
        # The thread holds the state alone, so that a writer which is dropped unclosed can be collected.
        self._state = _State(builder)
        self._most_rows = QUEUED_BLOCKS * block_rows

    @property
    def totals(self) -> Totals:
        """What has been queued so far, written or not."""
        return self._state.totals

    @property
    def ended(self) -> bool:
        """Whether ``end`` has done its work."""
        return self._state.ended

    def put(self, record: Record) -> None:
        """Queue a record. Raises an error of the thread since the last call; the record is then not queued."""
        state = self._state
        state.start()
        state.try_again()
        state.wait(lambda: state.error is not None or self._has_room(record))
        state.raise_error()
        with state.appending:
            state.waiting.append(_Item(record, state.totals.plus(record)))
        state.wake.put(None)

    def drain(self) -> None:
        """Wait until the builder has every record. Raises an error of the thread since the last call."""
        state = self._state
        state.try_again()
        state.wait(lambda: state.error is not None or state.idle)
        state.raise_error()

    def call(self, job: Job) -> None:
        """Have the thread run ``job`` when it has nothing else to do, and wait. Raises what the job raises.

        A caller that is interrupted while it waits leaves the job to the thread: it is run, once.
        """
        state = self._state
        state.wait(lambda: state.job is None)  # of a call that was interrupted
        state.job_error, state.job = None, job
        state.wait(lambda: state.job is None)
        error, state.job_error = state.job_error, None
        if error is not None:
            raise error

    def end(self, job: Job) -> None:
        """End the thread after its current record; its last act is to give the builder the rest and to run ``job``.

        Waiting for that is short, and what is not noted then is lost: a ``KeyboardInterrupt`` waits until it is over.
        Raises what the job raises. A second call waits for the first one's job and does nothing else.
        """
        state = self._state
        if state.last is None:
            state.last = job
        state.wake.put(None)
        if threading.get_ident() == state.thread:  # collected in the thread itself, which goes on to end
            return
        interrupt = None
        while not state.ended:
            try:
                state.wait(lambda: state.ended)
            except KeyboardInterrupt as caught:
                interrupt = caught
        error, state.job_error = state.job_error, None
        if interrupt is not None:
            raise interrupt from error
        if error is not None:
            raise error

    def _has_room(self, record: Record) -> bool:
        state = self._state
        if not state.waiting:
            return True  # even a record larger than the whole queue
        after, taken = state.totals.plus(record), state.taken
        return (
            after.rows - taken.rows <= self._most_rows
            and after.values - taken.values <= QUEUED_BLOCKS * MAX_BLOCK_VALUES
        )


class _Item(NamedTuple):
    record: Record
    totals: Totals  # with this record


class _State:
    """What the thread shares with its callers, each of whose fields one of the two sides alone changes."""

    def __init__(self, builder: ShardBuilder) -> None:
        # Of the callers.
        # Several may add records. Of the thread that an interrupt kept from giving it back it is no hindrance.
        self.appending = threading.RLock()
        self.waiting: deque[_Item] = deque()  # the thread takes from it
        self.retry = False  # wanted; the thread takes it back
        self.job: Job | None = None  # wanted; the thread takes it back
        self.last: Job | None = None  # wanted, and then the end
        self.wake: SimpleQueue[None] = SimpleQueue()
        # Of the thread.
        self.taken = Totals()  # what the builder has been given
        self.error: BaseException | None = None  # not yet raised; who raises it takes it back
        self.job_error: BaseException | None = None  # likewise
        self.failures = 0
        self.failed = False  # the builder gets no record until a retry has succeeded
        self.busy = self.ended = False
        self.thread: int | None = None
        self.news: SimpleQueue[None] = SimpleQueue()
        self._running = threading.Lock()  # held by the thread as long as it lives
        self._builder = builder

    # ---- in the callers' threads -----------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        try:
            return self.waiting[-1].totals
        except IndexError:
            return self.taken  # which the thread has set before it took the last item

    @property
    def idle(self) -> bool:
        # In the order opposite to that in which the thread writes them.
        return not (self.waiting or self.busy or self.failed)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until ``done()``, which something that the thread does makes true."""
        while not done():
            self.start()
            self.wake.put(None)
            with suppress(Empty):
                self.news.get(timeout=POLL_S)

    def try_again(self) -> None:
        """Have the thread retry what failed, if its error has been raised already, and wait for the outcome."""
        if self.failed and self.error is None:
            before = self.failures
            self.retry = True
            self.wait(lambda: not self.failed or self.failures > before)

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def start(self) -> None:
        """Start the thread, unless it runs. Of two that an interrupted start may leave, one ends at once."""
        if self.ended or self._running.locked():
            return
        try:
            threading.Thread(target=self.run, name="kdfast-writer", daemon=True).start()
        except RuntimeError:  # the interpreter is shutting down
            if self._running.acquire(blocking=False):
                try:
                    self._work()
                finally:
                    self._running.release()

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        if not self._running.acquire(blocking=False):
            return
        try:
            self.thread = threading.get_ident()
            while not self.ended:
                self._work()
                if not self.ended:
                    self.wake.get()
        finally:
            self.thread = None
            self._running.release()

    def _work(self) -> None:
        """Do what there is to do."""
        while self.last is None:
            if self.failed:
                if not self.retry:
                    break
                self.retry = False
                self._advance()
            elif self.waiting:
                self._take()
                self._advance()
            else:
                break
        if self.last is not None:
            self._end(self.last)
        elif self.job is not None:
            self._run(self.job)
            self.job = None
        self._tell()

    def _take(self) -> None:
        self.busy = True
        item = self.waiting[0]
        self.taken = item.totals
        self._builder.push(item.record)
        self.waiting.popleft()

    def _advance(self) -> None:
        error = None
        try:
            self._builder.advance()
        except BaseException as caught:
            error = caught
        self.failures += error is not None
        self.error, self.failed = error, error is not None
        self.busy = False
        self._tell()

    def _end(self, job: Job) -> None:
        while self.waiting:
            self._take()
        self._run(job)
        self.busy, self.ended = False, True

    def _run(self, job: Job) -> None:
        try:
            job()
        except BaseException as caught:
            self.job_error = caught

    def _tell(self) -> None:
        """Wake a caller that waits."""
        if self.news.empty():
            self.news.put(None)
