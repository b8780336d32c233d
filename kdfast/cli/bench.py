"""``kdfast bench``: losses against eager PyTorch and torch.compile, the cache against other systems' labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kdfast.cli.terminal import check_choice, exit_on_error, progress_bar

if TYPE_CHECKING:
    from kdfast.bench.cache import CodecConfig, Row
    from kdfast.bench.random_access import RandomAccess

TABLE_WIDTH = 150  # of tables that nobody could read in folded lines

app = typer.Typer(help="Benchmarks of the losses and the cache.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Benchmarks of the losses and the cache."""


@app.command()
def loss(
    case: Annotated[list[str] | None, typer.Option(help="Cases to run; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float32; default: both.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="ROWSxCOLUMNS; default: the README's three.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 11,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and Markdown results.")] = None,
) -> None:
    """Time cross-entropy + divergence, forward + backward: kdfast, eager PyTorch and torch.compile in one run."""
    from kdfast.bench.loss import CASES, COLUMNS, DTYPES, SHAPES, cells, measure, save_loss

    shapes = [_parse_shape(text) for text in shape] if shape else SHAPES
    plan = [
        (check_choice(c, CASES), check_choice(d, DTYPES), *size)
        for c in case or CASES
        for d in dtype or DTYPES
        for size in shapes
    ]
    console = Console()
    results = [measure(*item, repeats) for item in track(plan, "Timing", console=console)]
    _print_table(console, COLUMNS, [cells(result) for result in results])
    if out is not None:
        console.print(f"Written to {save_loss(results, out)}")


@app.command()
def head(
    case: Annotated[list[str] | None, typer.Option(help="Cases to time; default: all.")] = None,
    memory: Annotated[bool, typer.Option(help="Also measure the memory of the cases, at a larger shape.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and Markdown results.")] = None,
) -> None:
    """Time losses from hidden states: kdfast, eager PyTorch, torch.compile, and the matrix products alone."""
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

    timed = [check_choice(name, CASES) for name in case or CASES]
    measured = [name for name in MEMORY_CASES if memory and name in timed]
    console = Console(width=max(Console().width, TABLE_WIDTH))
    times = [measure_head(name, repeats) for name in track(timed, "Timing", console=console)]
    sizes = [measure_memory(name) for name in track(measured, "Measuring memory", console=console)]
    _print_table(console, COLUMNS, [cells(result) for result in times])
    _print_table(console, MEMORY_COLUMNS, [memory_cells(result) for result in sizes])
    console.print(LEGEND.replace("\n", " "))
    if out is not None:
        console.print(f"Written to {save_head(times, sizes, out)}", soft_wrap=True)


@app.command()
def cache(
    teacher: Annotated[
        Path,
        typer.Option(help="The teacher's hidden states, made if absent, with its prototypes beside it."),
    ] = Path("output/bench/teacher.safetensors"),
    tokens: Annotated[int, typer.Option(min=256, help="Positions to store.")] = 30_720,
    evaluated: Annotated[int, typer.Option(min=2, help="Positions of these to compare with the teacher.")] = 1024,
    arm: Annotated[list[str] | None, typer.Option(help="Codecs of kdfast, such as sample-50; default: all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each timing.")] = 7,
    records: Annotated[
        int, typer.Option("--random-access", min=0, help="Single-row records to write and gather; 0 for none.")
    ] = 1_000_000,
    remark: Annotated[str, typer.Option(help="A remark for the results, such as what else the machine did.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, Markdown and PNG results.")] = None,
) -> None:
    """Compare codecs and other systems' layouts: bytes per token, gradient noise, bias and KL."""
    from kdfast.bench.cache import ARMS
    from kdfast.bench.cache_plot import plot_cache
    from kdfast.bench.cache_report import COLUMNS, LEGEND, cells, describe_access, save_cache

    arms = [ARMS[check_choice(name, ARMS)] for name in arm or ARMS]
    console = Console(width=max(Console().width, TABLE_WIDTH))
    with exit_on_error():
        rows, stored = _cache_rows(teacher, tokens, evaluated, arms, repeats)
        access = _random_access(records) if records else None
        table = Table(*COLUMNS)
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(*cells(row))
        console.print(table)
        console.print(LEGEND.replace("\n", " "))
        if access is not None:
            console.print(describe_access(access))
        if out is not None:
            about: dict[str, str | int] = {
                "teacher": "SmolLM2-135M",
                "tokens": stored,
                "evaluated": min(evaluated, stored),
            }
            path = save_cache(rows, access, about | ({"remark": remark} if remark else {}), out)
            plot_cache(rows, path.with_suffix(".png"), f"Labels of {about['teacher']}, {stored:,} tokens")
            console.print(f"Written to {path}", soft_wrap=True)


def _cache_rows(
    teacher: Path, tokens: int, evaluated: int, arms: list[CodecConfig], repeats: int
) -> tuple[list[Row], int]:
    """The table's rows, and the number of positions stored. The prototypes were learned from other windows."""
    from kdfast.bench.cache import measure_ours, measure_rivals, sampled_rows
    from kdfast.bench.layouts import LAYOUTS
    from kdfast.bench.teacher import LEARN_WINDOWS, LENGTH, load_prototypes, load_teacher

    whole = load_teacher(teacher)
    counts = sorted({a.prototypes for a in arms if a.prototypes})
    tables = {count: load_prototypes(whole, teacher.parent, count) for count in counts}
    corpus = whole.part(LEARN_WINDOWS, -(-tokens // LENGTH))
    sampled = sampled_rows(corpus, evaluated)
    passes = len({a.prototypes for a in arms})
    with (
        TemporaryDirectory(prefix="kdfast-bench-") as folder,
        progress_bar("Caches", passes * len(corpus) + len(arms) + len(LAYOUTS)) as step,
    ):
        ours = measure_ours(
            corpus, tables, arms, Path(folder), sampled=sampled, repeats=repeats, advance=lambda doing: step(1)
        )
        return [*ours, *measure_rivals(corpus, sampled, lambda doing: step(1))], corpus.ids.numel()


def _random_access(records: int) -> RandomAccess:
    from kdfast.bench.random_access import random_access

    with TemporaryDirectory(prefix="kdfast-bench-") as folder, progress_bar("Records", records) as step:
        return random_access(Path(folder), records, step)


def _parse_shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(f"a shape is ROWSxCOLUMNS, such as 512x32000; got {text!r}") from None
    return rows, columns


def _print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
