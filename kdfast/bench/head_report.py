"""The head benchmark's two tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kdfast.bench.head import HeadMeasurement, HeadMemory
from kdfast.bench.report import markdown, save

__all__ = ["COLUMNS", "MEMORY_COLUMNS", "cells", "memory_cells", "save_head"]

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
    """A measurement under ``COLUMNS``."""
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
    """A measurement under ``MEMORY_COLUMNS``."""
    ours = r.mib["ours"]
    others = (f"{r.mib[name]:,.0f} ({r.mib[name] / ours:.1f}x)" for name in ("eager", "compile"))
    at_large = r.mib["eager"] * LARGE / (r.rows * r.columns) / ours
    return (r.case, f"{r.rows} x {r.columns} x {r.width}", f"{ours:,.0f}", *others, f"{at_large:.0f}x")


def save_head(times: list[HeadMeasurement], memory: list[HeadMemory], folder: Path) -> Path:
    """Writes ``head-cpu-<date>.json`` and the same as Markdown beside it."""
    text = [markdown(COLUMNS, map(cells, times)), markdown(MEMORY_COLUMNS, map(memory_cells, memory)), LEGEND]
    document = {"times": [asdict(r) for r in times], "memory": [asdict(r) for r in memory]}
    return save("head-cpu", folder, document, "\n\n".join(text))
