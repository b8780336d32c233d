"""``kdfast cache merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import kdfast.cache
from kdfast.cli.failing import failing
from kdfast.cli.progress import bar

__all__ = ["merge"]


def merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="SRC... DST", help="Caches of one kind, and where to bring them together.")
    ],
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies.")] = False,
) -> None:
    """Bring caches together: shards are checked and copied as they are. Can be run again after a crash."""
    from kdfast.cache.tools.merge import merge

    if len(folders) < 2:
        raise typer.BadParameter("give at least one source and the destination")
    *sources, destination = folders
    with failing():
        total = sum(kdfast.cache.open(source).info.shards for source in dict.fromkeys(sources))
        with bar("Shards", total) as advance:
            report = merge(sources, destination, link=link, progress=lambda: advance(1))
    already = f", {report.present:,} there already" if report.present else ""
    Console().print(
        f"{report.copied:,} shards {'linked' if link else 'copied'} ({report.copied_bytes:,} bytes){already}; "
        f"{destination} holds {report.records:,} records ({report.duplicates:,} duplicates besides)",
        soft_wrap=True,
    )
    if report.unfinished:
        files = escape(", ".join(report.unfinished))
        Console(stderr=True).print(
            f"[yellow]not merged[/]: {files}: what their writers have not sealed; finish them and merge again",
            soft_wrap=True,
        )
