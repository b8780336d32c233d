"""Signals that ask a process to stop, held back until its state is on disk."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]

ASK_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Holds SIGINT and SIGTERM back within a ``with`` block, for a loop that can stop at certain points only::

        with Interrupts("run/last.pt") as interrupts:
            for batch in loader:
                step(batch)
                if interrupts.signal:
                    save()
                    interrupts.deliver()

    The second signal is delivered at once. Signals that the process ignores are ignored here, too; in another thread
    than the main one nothing is held back.

    Args:
        what: what is written before the process stops, for a line on standard error; None holds nothing back.

    Attributes:
        signal: the number of the signal that has arrived, or 0.
    """

    def __init__(self, what: str | None) -> None:
        self._what = what
        self._before: dict[int, Any] = {}
        self.signal = 0

    def __enter__(self) -> Interrupts:
        self._hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def deliver(self, number: int = 0) -> None:
        """Let the signal take effect. By default SIGINT raises ``KeyboardInterrupt``, and SIGTERM ends the process.

        Where a handler of the caller's own returns, the loop goes on, and the next signal is held back again.

        Args:
            number: a signal, if it is another process that got it.
        """
        number, self.signal = number or self.signal, 0
        self._release()
        signal.raise_signal(number)
        self._hold()

    def _hold(self) -> None:
        if self._what is None or threading.current_thread() is not threading.main_thread():
            return
        for number in ASK_TO_STOP:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self.deliver(number)
            return
        self.signal = number
        name = signal.Signals(number).name
        print(f"{name}: {self._what} is being written; another {name} stops at once", file=sys.stderr, flush=True)
