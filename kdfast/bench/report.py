"""Benchmark results as a table and as dated JSON with the machine in it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

import kdfast._C as _C
from kdfast import __version__
from kdfast.bench.loss import Measurement

__all__ = ["COLUMNS", "cells", "environment", "markdown", "save"]


def environment() -> dict[str, str | int]:
    """What a figure depends on: machine, versions, commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "kdfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def save(results: list[Measurement], folder: Path) -> Path:
    """Writes ``loss-cpu-<date>.json`` and the same as a Markdown table beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    path = folder / f"loss-cpu-{str(where['date'])[:10]}.json"
    rows = [{**asdict(result), "ratios": result.ratios} for result in results]
    path.write_text(json.dumps({"environment": where, "results": rows}, indent=1) + "\n")
    heading = ", ".join(f"{key} {value}" for key, value in where.items())
    path.with_suffix(".md").write_text(f"{markdown(results)}\n\n{heading}\n")
    return path


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


def markdown(results: list[Measurement]) -> str:
    """One line per measurement."""
    rule = "|---" * len(COLUMNS) + "|"
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, *map(cells, results))]
    return "\n".join([lines[0], rule, *lines[1:]])
