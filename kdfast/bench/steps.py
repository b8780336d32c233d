"""Training steps of a loss, as a benchmark's contenders: how they are made, and their time and memory on the CPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.loss.workspace import release

__all__ = ["Contenders", "Run", "compiled", "extra_mib", "median_ms", "seconds_of", "step"]

# One step. It returns what it computes, which tests compare and benchmarks drop.
Run = Callable[[], Any]
# The functions that make the contenders' steps, by name. Each is called by itself, since some may fail.
Contenders = dict[str, Callable[[], Run]]


class _Computed(torch.autograd.Function):
    """The identity, whose result is no leaf: logits that a loss may overwrite, as if a model had computed them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def step(loss: Callable[..., Tensor], *leaves: Tensor, inplace: bool = False) -> Run:
    """A step that computes a loss and the gradients of its arguments.

    Args:
        loss: a function of the leaves, giving a scalar.
        leaves: tensors whose gradients are computed.
        inplace: whether the loss may overwrite them.
    """
    leaves = tuple(x.requires_grad_() for x in leaves)

    def run() -> tuple[Tensor, ...]:
        inputs = tuple(map(_Computed.apply, leaves)) if inplace else leaves
        value = loss(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    return run


def compiled(make: Callable[[Any], Run], loss: Any) -> Callable[[], Run]:
    """The function that makes a step of the compiled loss, by ``make``; compiling takes place in its first call."""

    def run() -> Run:
        torch.compiler.reset()
        return make(torch.compile(loss))

    return run


def seconds_of(run: Run) -> float:
    """The seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_ms(timed: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median milliseconds by name of functions that return their seconds, called in turn.

    There are ``repeats`` rounds, after one of warm-up.
    """
    rounds = [{name: run() for name, run in timed.items()} for _ in range(repeats + 1)][1:]
    return {name: 1e3 * statistics.median(seconds[name] for seconds in rounds) for name in timed}


# ---- memory: the most that a process of its own holds while a step runs ---------------------------------------------


_MIB = 1 << 20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_mib(make: Callable[[], Run]) -> float:
    """MiB that a step takes beyond what is allocated before it, its results included, in a process of its own.

    Linux only.

    Args:
        make: makes the step; must be picklable.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_extra_mib, make).result()


def _extra_mib(make: Callable[[], Run]) -> float:
    run = make()
    run()  # compiles, and allocates what stays
    release()  # the workspace that a loss keeps for the next one counts
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
