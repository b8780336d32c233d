"""``kdfast cache``: look into a cache of soft labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kdfast.cache
from kdfast.cache import CacheError, CacheInfo

__all__ = ["app", "failing"]

app = typer.Typer(no_args_is_help=True, help="Look into a cache of soft labels.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The cache's directory.", show_default=False)]


@app.command()
def info(folder: Folder) -> None:
    """What the cache holds. Headers, indices and keys are checked."""
    with failing():
        Console().print(_table(kdfast.cache.open(folder).info))


@app.command()
def verify(folder: Folder) -> None:
    """Read every file and check every byte."""
    with failing():
        cache = kdfast.cache.open(folder)
        cache.verify()
    Console().print(f"[green]ok[/]: {len(cache):,} records, every checksum matches")


@contextmanager
def failing() -> Iterator[None]:
    """End the command with the error's text and exit code 1 where a cache or a file is at fault."""
    try:
        yield
    except (CacheError, OSError) as error:
        Console(stderr=True).print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _table(about: CacheInfo) -> Table:
    per_row = max(about.rows, 1)
    rows = {
        "teacher": about.teacher or "(not named)",
        "codec": f"{about.codec} {about.config}",
        "vocabulary": f"{about.vocab_size:,}",
        "temperatures": ", ".join(f"{t:g}" for t in about.temperatures),
        "records": f"{about.records:,} ({about.duplicates:,} duplicates besides)",
        "rows": f"{about.rows:,}",
        "shards": f"{about.shards:,}",
        "labels": f"{about.payload_bytes:,} bytes, {about.payload_bytes / per_row:.1f} per row",
        "files": f"{about.file_bytes:,} bytes, {about.file_bytes / per_row:.1f} per row",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
