"""``kdfast cache``: look into caches of soft labels, and make one from another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kdfast.cache
from kdfast.cache import CacheInfo
from kdfast.cli.cache_capture import capture
from kdfast.cli.cache_capture_vllm import capture_vllm
from kdfast.cli.cache_convert import convert
from kdfast.cli.cache_export import export
from kdfast.cli.cache_merge import merge
from kdfast.cli.cache_stats import stats
from kdfast.cli.failing import failing

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look into caches of soft labels, and make one from another.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The cache's directory.", show_default=False)]


for command in (capture, capture_vllm, stats, merge, convert, export):
    app.command()(command)


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


def _table(about: CacheInfo) -> Table:
    per_row = max(about.rows, 1)
    rows = {
        "teacher": about.teacher or "(not named)",
        "codec": f"{about.codec} {about.config}",
        "because": about.codec_reason,
        "vocabulary": f"{about.vocab_size:,}",
        "temperatures": ", ".join(f"{t:g}" for t in about.temperatures),
        "records": f"{about.records:,} ({about.duplicates:,} duplicates besides)",
        "rows": f"{about.rows:,}",
        "shards": f"{about.shards:,}",
        "labels": f"{about.payload_bytes:,} bytes, {about.payload_bytes / per_row:.1f} per row",
        "shards' files": f"{about.file_bytes:,} bytes, {about.file_bytes / per_row:.1f} per row",
        "table of prototypes": f"{about.asset_bytes:,} bytes" if about.asset_bytes else "",
        "index": f"{about.index_bytes:,} bytes; {about.index}",
        "teacher's cross-entropy": "" if about.cross_entropy is None else f"{about.cross_entropy:.4f} nats",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    return table
