"""Progress of long work on standard error: a bar where that is a terminal or a notebook, else a line a minute."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

INTERVAL = 60.0  # seconds between lines, where there is no bar


class Progress:
    """Shows how far some work is::

        with Progress("capture", total=len(loader), unit="batches", shown=progress) as bar:
            for batch in loader:
                ...
                bar.advance(note=f"{rate:,.0f} rows/s")

    On a terminal and in a notebook it is a bar. Elsewhere, as in the log of a job, it is a line a minute, and, if there
    was one, a last line at the end: nothing of work that takes less.

    Args:
        title: the text before the numbers.
        total: of steps; None if it is not known.
        unit: what a step is, in the plural.
        shown: False shows nothing.
        initial: steps that were done before.
    """

    def __init__(
        self, title: str, *, total: int | None = None, unit: str = "steps", shown: bool = True, initial: int = 0
    ) -> None:
        self._title, self._total, self._unit, self._shown = title, total, unit, shown
        self._done = self._initial = initial
        self._note = ""
        self._began = self._last = time.monotonic()
        self._lines = 0
        self._bar: Any = self._tqdm() if shown and _can_redraw() else None

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count ``steps`` as done. ``note`` is shown after the numbers, until the next one."""
        self._done += steps
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
        elif self._shown and time.monotonic() - self._last >= INTERVAL:
            self._line()

    def close(self) -> None:
        """End the bar, or the lines if there were any. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and self._shown:
            self._line()
        self._bar, self._shown = None, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tqdm(self) -> Any:
        from tqdm import tqdm

        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} " + self._unit + " [{elapsed}<{remaining}{postfix}]"
        if self._total is None:
            layout = "{desc}: {n_fmt} " + self._unit + " [{elapsed}{postfix}]"
        return tqdm(total=self._total, initial=self._initial, desc=self._title, bar_format=layout)

    def _line(self) -> None:
        now = time.monotonic()
        elapsed, done = now - self._began, self._done - self._initial
        parts = [f"{self._done:,}{'' if self._total is None else f'/{self._total:,}'} {self._unit}"]
        parts += [self._note] * bool(self._note)
        parts.append(f"after {_clock(elapsed)}")
        if self._total is not None and done and self._done < self._total:
            parts.append(f"{_clock(elapsed / done * (self._total - self._done))} left")
        print(f"{self._title}: {', '.join(parts)}", file=sys.stderr, flush=True)
        self._last, self._lines = now, self._lines + 1


def _can_redraw() -> bool:
    """Whether standard error is a terminal, or the output of a notebook's cell, which says that it is none."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
