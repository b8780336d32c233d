"""Plotting a cache's distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdfast.cache.errors import optional_package
from kdfast.cache.tools.stats import MASS_BINS, CacheStats

__all__ = ["plot_stats"]

COLOUR = "#0072B2"


def plot_stats(stats: CacheStats, path: Path) -> None:
    """Plot entries per row, bytes per row of each block, and tail mass side by side into the PNG ``path``.

    Raises:
        CacheError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    figure_module = optional_package("matplotlib.figure", "plotting")
    agg = optional_package("matplotlib.backends.backend_agg", "plotting")
    figure = figure_module.Figure(figsize=(12, 3.8), layout="constrained")
    agg.FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    entries, bytes_per_row, tails = figure.subplots(1, 3)
    _entries(entries, stats)
    _bytes(bytes_per_row, stats)
    _tails(tails, stats)
    about = stats.info
    figure.suptitle(f"{about.codec} cache, {stats.rows:,} rows, V = {about.vocab_size:,}")
    figure.savefig(path, dpi=150, format="png")


def _entries(axes: Any, stats: CacheStats) -> None:
    axes.set_xlabel("entries per row")
    axes.set_ylabel("rows")
    if len(stats.entries):
        axes.bar(np.arange(len(stats.entries)), stats.entries, width=1.0, color=COLOUR)
        axes.axvline(stats.entries_per_row, color="black", ls=":", label=f"mean {stats.entries_per_row:.1f}")
        axes.legend()
    else:
        _nothing(axes, f"{stats.kind or 'no'} labels: every column")


def _bytes(axes: Any, stats: CacheStats) -> None:
    axes.set_xlabel("bytes per row, by block")
    axes.set_ylabel("blocks")
    if len(stats.block_bytes):
        axes.hist(stats.block_bytes, bins=min(50, 1 + len(stats.block_bytes)), color=COLOUR)
    else:
        _nothing(axes, "no block")


def _tails(axes: Any, stats: CacheStats) -> None:
    axes.set_xlabel("probability outside the entries")
    axes.set_ylabel("share of rows, cumulated")
    if stats.tail_mass is None:
        _nothing(axes, "the labels have no tail")
        return
    for counts, temperature in zip(stats.tail_mass, stats.info.temperatures, strict=True):
        axes.step(MASS_BINS[1:], counts.cumsum() / max(counts.sum(), 1), where="post", label=f"T = {temperature:g}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.legend()


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
