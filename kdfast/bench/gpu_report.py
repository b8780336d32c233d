"""The GPU benchmark's results as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdfast.bench.gpu_cases import Result
from kdfast.bench.report import markdown, save

__all__ = ["COLUMNS", "ceilings", "cells", "save_gpu"]

COLUMNS = (
    "case",
    "dtype",
    "rows x V",
    "ours ms",
    "GB/s",
    "of copy",
    "M rows/s",
    "others, times as long",
    "MiB: ours / eager",
)


def ceilings() -> dict[str, Any]:
    """The machine, and how fast it copies and multiplies."""
    from kdfast.bench.gpu_timing import copy_bandwidth, matmul_rate

    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_s": copy_bandwidth(),
        "bf16_tflop_s": matmul_rate(),
        "cuda": torch.version.cuda,
    }


def cells(result: Result, copy_gb_s: float) -> tuple[str, ...]:
    """A result under ``COLUMNS``; the others' times are over ours in the same run."""
    ours = result.ms.get("ours", float("nan"))
    others = [f"{name} {ms / ours:.1f}" for name, ms in result.ms.items() if name != "ours"]
    others += [f"{name} failed" for name in result.failed]
    return (
        result.name,
        result.dtype,
        f"{result.rows} x {result.columns}",
        f"{ours:.3f}",
        f"{result.gb_s:,.0f}" if result.gb_s else "",
        f"{result.gb_s / copy_gb_s:.0%}" if result.gb_s else "",
        f"{result.rows / ours / 1e3:.2f}",
        ", ".join(others),
        " / ".join(f"{result.peak_mib[name]:,.0f}" for name in ("ours", "eager") if name in result.peak_mib),
    )


def save_gpu(results: list[Result], machine: dict[str, Any], checks: dict[str, str], folder: Path) -> Path:
    """Writes ``gpu-<date>.json`` and the same as Markdown beside it. Call it after every case: a run may be cut."""
    lines = [
        markdown(COLUMNS, (cells(result, machine["copy_gb_s"]) for result in results)),
        "`GB/s`: the fewest bytes that a case must move over our time; `of copy`: of the copy bandwidth in that run.",
        *(
            f"{result.name}, {result.dtype}: gradient error against float64 " + errors(result)
            for result in results
            if result.gradient_error
        ),
        *(f"{result.name}: {name} failed: {why}" for result in results for name, why in result.failed.items()),
        *(f"{name}: {text}" for name, text in checks.items()),
    ]
    document = {"checks": checks, "results": [asdict(result) for result in results]}
    return save("gpu", folder, document, "\n\n".join(lines), machine)


def errors(result: Result) -> str:
    """In words."""
    return ", ".join(f"{name} {value:.1e}" for name, value in result.gradient_error.items())
