"""``kdfast cache stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import kdfast.cache
from kdfast.cli.failing import failing
from kdfast.cli.progress import bar

if TYPE_CHECKING:
    from kdfast.cache.tools.stats import CacheStats

__all__ = ["stats"]


def stats(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The cache's directory.", show_default=False)],
    plot: Annotated[Path | None, typer.Option(help="Write the distributions as a PNG.")] = None,
) -> None:
    """What the bytes go to, and how entries and tails are distributed. Every row is read."""
    from kdfast.cache.tools.stats import cache_stats

    with failing():
        with bar("Records", len(kdfast.cache.open(folder))) as advance:
            found = cache_stats(folder, progress=advance)
        Console().print(_table(found))
        if plot is not None:
            from kdfast.cache.tools.plot import plot_stats

            plot_stats(found, plot)
            Console().print(f"Plotted to {plot}", soft_wrap=True)


def _table(found: CacheStats) -> Table:
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
    return table
