"""The head benchmark on the CPU: a loss from hidden states against other implementations, by time, memory, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast import kd_loss
from kdfast.bench.head_contenders import HeadCase, head_contenders
from kdfast.bench.report import markdown, save
from kdfast.bench.steps import Run, extra_mib, median_ms, seconds_of
from kdfast.labels.head import Head
from kdfast.testing import relative_error

__all__ = [
    "CASES",
    "COLUMNS",
    "MEMORY_CASES",
    "MEMORY_COLUMNS",
    "HeadMeasurement",
    "HeadMemory",
    "cells",
    "measure_head",
    "measure_memory",
    "memory_cells",
    "save_head",
]

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
    """The times and the accuracy of one case, from one run.

    Attributes:
        case: its name.
        rows, columns, width: of the head.
        ms: median milliseconds by contender.
        gradient_error: max |grad - grad64| / max |grad64| by contender, the larger of hidden states' and weight's.
    """

    case: str
    rows: int
    columns: int
    width: int
    ms: dict[str, float]
    gradient_error: dict[str, float]


@dataclass(frozen=True)
class HeadMemory:
    """The memory of one case.

    Attributes:
        case: its name.
        rows, columns, width: of the head.
        mib: MiB beyond weights, inputs and gradients, by contender.
    """

    case: str
    rows: int
    columns: int
    width: int
    mib: dict[str, float]


def measure_head(name: str, repeats: int, case: HeadCase | None = None, *, compile: bool = True) -> HeadMeasurement:
    """Time every contender in turn, for ``repeats`` rounds after one of warm-up."""
    case = case or CASES[name]
    runs = {contender: make() for contender, make in head_contenders(case, "cpu", compile=compile).items()}
    ms = median_ms({contender: partial(seconds_of, run) for contender, run in runs.items()}, repeats)
    return HeadMeasurement(name, case.rows, case.columns, case.width, ms, gradient_errors(case))


def measure_memory(name: str) -> HeadMemory:
    """Measure the memory of ours, eager PyTorch and torch.compile, each in a process of its own."""
    case = MEMORY_CASES[name]
    gradients = (case.rows + case.columns) * case.width * case.dtype.itemsize / (1 << 20)
    mib = {
        contender: extra_mib(partial(_make, case, contender)) - gradients for contender in ("ours", "eager", "compile")
    }
    return HeadMemory(name, case.rows, case.columns, case.width, mib)


def _make(case: HeadCase, contender: str) -> Run:
    return head_contenders(case, "cpu")[contender]()


def gradient_errors(case: HeadCase, rows: int = 64, spread: float = 10.0, gap: float = 0.05) -> dict[str, float]:
    """Errors of the gradients against float64, by contender, as late in training.

    Args:
        case: the head, of which ``rows`` rows are used.
        rows: how many.
        spread: the logits' standard deviation.
        gap: the standard deviation of the teacher's logits from the student's.
    """
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


# ---- the two tables -------------------------------------------------------------------------------------------------


COLUMNS = (
    "case",
    "rows x V x H",
    "ours ms",
    "over products",
    "eager",
    "torch.compile",
    "linear_cross_entropy",
    "grad error ours / eager",
)
MEMORY_COLUMNS = ("case", "rows x V x H", "ours MiB", "eager", "torch.compile", "eager / ours at 8192 x 128256")
LARGE = 8192 * 128256
LEGEND = """`over products`: our time over that of the matrix products alone, at the same chunk shapes and precisions;
other columns: their time over ours. `grad error`: max |grad - grad64| / max |grad64|, the larger of hidden states' and
weight's, 64 rows, logits of standard deviation 10 and a teacher .05 beside them. Memory is beyond weights, inputs and
gradients; eager PyTorch's grows with the logits, ours ends at KDFAST_WORKSPACE, which the last column supposes."""


def cells(r: HeadMeasurement) -> tuple[str, ...]:
    """The first table's row of a measurement, in the order of ``COLUMNS``."""
    ours = r.ms["ours"]
    others = ("eager", "compile", "linear_cross_entropy")
    return (
        r.case,
        f"{r.rows} x {r.columns} x {r.width}",
        f"{ours:.0f}",
        f"{ours / r.ms['products']:.2f}x",
        *(f"{r.ms[name] / ours:.2f}x" if name in r.ms else "" for name in others),
        f"{r.gradient_error['ours']:.1e} / {r.gradient_error['eager']:.1e}",
    )


def memory_cells(r: HeadMemory) -> tuple[str, ...]:
    """The second table's row of a measurement, in the order of ``MEMORY_COLUMNS``."""
    ours = r.mib["ours"]
    others = (f"{r.mib[name]:,.0f} ({r.mib[name] / ours:.1f}x)" for name in ("eager", "compile"))
    at_large = r.mib["eager"] * LARGE / (r.rows * r.columns) / ours
    return (r.case, f"{r.rows} x {r.columns} x {r.width}", f"{ours:,.0f}", *others, f"{at_large:.0f}x")


def save_head(times: list[HeadMeasurement], memory: list[HeadMemory], folder: Path) -> Path:
    """Write ``head-cpu-<date>.json`` and the same as Markdown, and return the JSON's path."""
    text = [markdown(COLUMNS, map(cells, times)), markdown(MEMORY_COLUMNS, map(memory_cells, memory)), LEGEND]
    document = {"times": [asdict(r) for r in times], "memory": [asdict(r) for r in memory]}
    return save("head-cpu", folder, document, "\n\n".join(text))
