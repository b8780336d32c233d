"""A head's loss on the CPU: time against who else can do it and against its matrix products, memory, and accuracy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdfast import kd_loss
from kdfast.bench.head_contenders import HeadCase, head_contenders
from kdfast.bench.memory import extra_mib
from kdfast.bench.steps import Run
from kdfast.labels.head import Head
from kdfast.testing import relative_error

__all__ = ["CASES", "MEMORY_CASES", "HeadMeasurement", "HeadMemory", "measure_head", "measure_memory"]

SHAPE = 512, 49152, 576
MEMORY_SHAPE = 2048, 128256, 576
CASES = {
    f"{teacher}-{name}": HeadCase(teacher, *SHAPE, *dtypes)
    for name, dtypes in {
        "float32": (torch.float32, torch.float32),
        "bfloat16": (torch.bfloat16, torch.float32),
        "bfloat16-logits": (torch.bfloat16, torch.bfloat16),
    }.items()
    for teacher in ("topk", "head", "soft-ce")
}
MEMORY_CASES = {
    name: replace(CASES[name], rows=MEMORY_SHAPE[0], columns=MEMORY_SHAPE[1])
    for name in ("topk-float32", "head-float32", "topk-bfloat16", "head-bfloat16")
}


@dataclass(frozen=True)
class HeadMeasurement:
    """Median milliseconds of each contender in one run, and how far a gradient is from float64's."""

    case: str
    rows: int
    columns: int
    width: int
    ms: dict[str, float]
    gradient_error: dict[str, float]  # of hidden states and weight, the larger: max |grad - grad64| / max |grad64|


@dataclass(frozen=True)
class HeadMemory:
    """MiB beyond weights, inputs and gradients."""

    case: str
    rows: int
    columns: int
    width: int
    mib: dict[str, float]


def measure_head(name: str, repeats: int, case: HeadCase | None = None, *, compile: bool = True) -> HeadMeasurement:
    """Times every contender in turn, ``repeats`` rounds after one that warms up."""
    case = case or CASES[name]
    runs = {contender: make() for contender, make in head_contenders(case, "cpu", compile=compile).items()}
    seconds: dict[str, list[float]] = {contender: [] for contender in runs}
    for _ in range(repeats + 1):
        for contender, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[contender].append(time.perf_counter() - start)
    ms = {contender: 1e3 * statistics.median(times[1:]) for contender, times in seconds.items()}
    return HeadMeasurement(name, case.rows, case.columns, case.width, ms, gradient_errors(case))


def measure_memory(name: str) -> HeadMemory:
    """Of ours, eager PyTorch and torch.compile, each in a process of its own."""
    case = MEMORY_CASES[name]
    gradients = (case.rows + case.columns) * case.width * case.dtype.itemsize / (1 << 20)
    mib = {
        contender: extra_mib(partial(_make, case, contender)) - gradients for contender in ("ours", "eager", "compile")
    }
    return HeadMemory(name, case.rows, case.columns, case.width, mib)


def _make(case: HeadCase, contender: str) -> Run:
    return head_contenders(case, "cpu")[contender]()


def gradient_errors(case: HeadCase, rows: int = 64, spread: float = 10.0, gap: float = 0.05) -> dict[str, float]:
    """Late in training: logits of that standard deviation, and a teacher that is so close to them."""
    hidden, weight = replace(case, rows=rows).inputs("cpu", spread)
    exact = hidden.double() @ weight.double().T
    teacher = exact + gap * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": lambda h, w, t: kd_loss(Head(h, w, logits_dtype=case.logits_dtype), t),
        "eager": lambda h, w, t: kd_loss((h @ w.T).to(t.dtype), t),
    }
    want = _gradients(losses["eager"], hidden.double(), weight.double(), teacher)
    got = {name: _gradients(loss, hidden, weight, teacher.float()) for name, loss in losses.items()}
    return {name: max(map(relative_error, grads, want)) for name, grads in got.items()}


def _gradients(loss: Any, hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(loss(*leaves, teacher), leaves)
