"""``kdfast bench head``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kdfast.cli.failing import known

__all__ = ["head"]

TABLE_WIDTH = 150  # of the times, which nobody could read if they were folded


def head(
    case: Annotated[list[str] | None, typer.Option(help="Cases to time; default: all.")] = None,
    memory: Annotated[bool, typer.Option(help="Also how much memory the cases take, at a larger shape.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and Markdown results.")] = None,
) -> None:
    """Loss from hidden states, forward + backward: ours, eager PyTorch, torch.compile, the bare matrix products."""
    from kdfast.bench.head import (
        CASES,
        COLUMNS,
        LEGEND,
        MEMORY_CASES,
        MEMORY_COLUMNS,
        cells,
        measure_head,
        measure_memory,
        memory_cells,
        save_head,
    )

    timed = [known(name, CASES) for name in case or CASES]
    weighed = [name for name in MEMORY_CASES if memory and name in timed]
    console = Console(width=max(Console().width, TABLE_WIDTH))
    times = [measure_head(name, repeats) for name in track(timed, "Timing", console=console)]
    sizes = [measure_memory(name) for name in track(weighed, "Weighing", console=console)]
    _print(console, COLUMNS, [cells(result) for result in times])
    _print(console, MEMORY_COLUMNS, [memory_cells(result) for result in sizes])
    console.print(LEGEND.replace("\n", " "))
    if out is not None:
        console.print(f"Written to {save_head(times, sizes, out)}", soft_wrap=True)


def _print(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
