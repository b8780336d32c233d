"""A training step of a loss, as a benchmark's contenders take it, and how much memory one takes."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast.loss.workspace import release

__all__ = ["Contenders", "Run", "compiled", "extra_mib", "step"]

# Returns what it computes, which a test compares and a benchmark drops.
Run = Callable[[], Any]
# Each is made on its own, since some cannot be.
Contenders = dict[str, Callable[[], Run]]


class _Computed(torch.autograd.Function):
    """What a model has computed, and a loss may write over, for nothing: the tensor itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def step(loss: Callable[..., Tensor], *leaves: Tensor, inplace: bool = False) -> Run:
    """Loss and gradients; the gradients are dropped, as a training step that has used them would."""
    leaves = tuple(x.requires_grad_() for x in leaves)

    def run() -> tuple[Tensor, ...]:
        inputs = tuple(map(_Computed.apply, leaves)) if inplace else leaves
        value = loss(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    return run


def compiled(make: Callable[[Any], Run], loss: Any) -> Callable[[], Run]:
    """Makes a step of what ``torch.compile`` makes of the loss."""

    def run() -> Run:
        torch.compiler.reset()
        return make(torch.compile(loss))

    return run


# ---- memory: the most that a process of its own holds while a step runs ---------------------------------------------


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
