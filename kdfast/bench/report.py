"""Benchmark results as a Markdown table, and as JSON with the date and the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kdfast._C as _C
from kdfast import __version__

__all__ = ["environment", "markdown", "save"]


def environment() -> dict[str, str | int]:
    """What a measurement depends on: the machine, versions, the commit; and the date."""
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


def save(name: str, folder: Path, document: dict[str, Any], text: str, machine: dict[str, Any] | None = None) -> Path:
    """Write ``<name>-<date>.json`` and ``<name>-<date>.md``, and return the JSON's path.

    Args:
        name: of the benchmark.
        folder: is made if need be.
        document: the JSON's contents besides the environment.
        text: the Markdown's contents besides the environment.
        machine: what is added to the environment, such as the GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = environment() | (machine or {})
    path = folder / f"{name}-{str(where['date'])[:10]}.json"
    path.write_text(json.dumps({"environment": where, **document}, indent=1, allow_nan=False) + "\n")
    heading = ", ".join(f"{key} {value}" for key, value in where.items())
    path.with_suffix(".md").write_text(f"{text}\n\n{heading}\n")
    return path


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of ``rows`` under ``columns``."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
