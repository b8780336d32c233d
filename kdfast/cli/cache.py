"""``kdfast cache``: inspect, merge and export caches of soft labels. The commands that make one: ``cache_sources``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kdfast.cache
from kdfast.cache import CacheInfo
from kdfast.cli.cache_sources import capture, capture_vllm, convert
from kdfast.cli.terminal import exit_on_error, progress_bar

if TYPE_CHECKING:
    from kdfast.cache.tools.stats import CacheStats

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Capture, inspect, convert, merge and export caches of soft labels.")

Folder = Annotated[str, typer.Argument(metavar="DIR", help="The cache's directory or URL.", show_default=False)]

for command in (capture, capture_vllm, convert):
    app.command()(command)


@app.command()
def info(folder: Folder) -> None:
    """Print what a cache holds. Headers, indices and keys are checked."""
    with exit_on_error():
        Console().print(_info_table(kdfast.cache.open(folder).info))


@app.command()
def verify(folder: Folder) -> None:
    """Read a whole cache and check every checksum."""
    with exit_on_error():
        cache = kdfast.cache.open(folder)
        cache.verify()
    Console().print(f"[green]ok[/]: {len(cache):,} records, every checksum matches")


@app.command()
def stats(
    folder: Folder,
    plot: Annotated[Path | None, typer.Option(help="A PNG to draw the distributions in.")] = None,
) -> None:
    """Print what a cache's bytes go to, and how entries and tails are distributed. Every row is read."""
    from kdfast.cache.tools.stats import cache_stats

    with exit_on_error():
        with progress_bar("Records", len(kdfast.cache.open(folder))) as advance:
            found = cache_stats(folder, progress=advance)
        Console().print(_stats_table(found))
        if plot is not None:
            from kdfast.cache.tools.plot import plot_stats

            plot_stats(found, plot)
            Console().print(f"Plotted to {plot}", soft_wrap=True)


@app.command()
def merge(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="SRC... DST", help="Caches of one kind, and the directory or URL to merge them in."),
    ],
    link: Annotated[bool, typer.Option("--link", help="Make hard links instead of copies.")] = False,
) -> None:
    """Merge caches: shards are checked and copied as they are. After a crash, run it again."""
    from kdfast.cache.tools.merge import merge

    if len(folders) < 2:
        raise typer.BadParameter("give at least one source and the destination")
    *sources, destination = folders
    with exit_on_error():
        total = sum(kdfast.cache.open(source).info.shards for source in dict.fromkeys(sources))
        with progress_bar("Shards", total) as advance:
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


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file to write.", show_default=False)],
) -> None:
    """Write a cache's labels as Parquet, one record per row, for tools that do not know kdfast."""
    from kdfast.cache.tools.export import export

    with exit_on_error(), progress_bar("Records", len(kdfast.cache.open(folder))) as advance:
        records = export(folder, out, progress=advance)
    Console().print(f"{records:,} records written to {out}", soft_wrap=True)


def _info_table(about: CacheInfo) -> Table:
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
        "floor": about.floor_text,
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value if value.isprintable() else value.encode("unicode_escape").decode()))
    return table


def _stats_table(found: CacheStats) -> Table:
    table = Table(show_header=False)
    about, used, stored = found.info, found.bytes, max(found.info.rows, 1)
    table.add_row("records", f"{about.records:,} ({about.duplicates:,} duplicates besides)")
    table.add_row("rows", f"{found.rows:,}")
    if len(found.entries):
        fewest, most = (int(n) for n in found.entries.nonzero()[0][[0, -1]]) if found.rows else (0, 0)
        table.add_row("entries per row", f"{found.entries_per_row:.2f} ({fewest} to {most})")
    for name in ("payload", "tables", "model", "assets", "indices", "files"):
        size = getattr(used, name)
        title = {"model": "codec models", "files": "all files"}.get(name, name)
        table.add_row(title, f"{size:,} bytes, {size / stored:.2f} per row")
    if found.mean_tail_mass is not None:
        for t, (temperature, mean) in enumerate(zip(about.temperatures, found.mean_tail_mass, strict=True)):
            shares = ", ".join(f"{100 * q:g} % below {found.tail_quantile(q, t):.2g}" for q in (0.1, 0.5, 0.9, 0.99))
            table.add_row(f"tail mass at T = {temperature:g}", f"mean {mean:.4f}; rows: {shares}")
    if about.cross_entropy is not None:
        table.add_row("teacher's cross-entropy", f"{about.cross_entropy:.4f} nats per target")
    table.add_row("floor", about.floor_text)
    return table
