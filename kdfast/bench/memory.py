"""How much memory a step takes: the most that a process of its own holds while it runs."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from kdfast.bench.steps import Run
from kdfast.loss.workspace import release

__all__ = ["extra_mib"]

_MIB = 1 << 20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_mib(make: Callable[[], Run]) -> float:
    """MiB above what is there before the step, its results included; ``make`` must be picklable. Linux only."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_extra_mib, make).result()


def _extra_mib(make: Callable[[], Run]) -> float:
    run = make()
    run()  # compiles, and allocates what stays
    release()  # what a loss keeps for the next one is a part of what it takes
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    CLEAR.write_text("5")  # the high-water mark begins anew
    results = run()
    after = _status("VmHWM")
    del results
    return (after - before) / _MIB


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
