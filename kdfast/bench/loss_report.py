"""The loss benchmark's table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kdfast.bench.loss import Measurement
from kdfast.bench.report import markdown, save

__all__ = ["COLUMNS", "cells", "save_loss"]

COLUMNS = ("case", "dtype", "rows x V", "ours ms", "eager", "torch.compile", "share of copy", "grad error ours / eager")


def cells(r: Measurement) -> tuple[str, ...]:
    """A measurement under ``COLUMNS``; every ratio is from one run with interleaved repeats."""
    return (
        r.case,
        r.dtype,
        f"{r.rows} x {r.columns}",
        f"{r.ms['ours']:.1f}",
        f"{r.ratios['eager']:.1f}x",
        f"{r.ratios['compile']:.1f}x",
        f"{r.share_of_copy:.0%}",
        f"{r.gradient_error['ours']:.1e} / {r.gradient_error['eager']:.1e}",
    )


def save_loss(results: list[Measurement], folder: Path) -> Path:
    """Writes ``loss-cpu-<date>.json`` and the same as a Markdown table beside it."""
    rows = [{**asdict(result), "ratios": result.ratios} for result in results]
    return save("loss-cpu", folder, {"results": rows}, markdown(COLUMNS, map(cells, results)))
