"""Plotting bytes per token against gradient noise and KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.bench.cache import ARMS, Row
from kdfast.cache.errors import optional_package

__all__ = ["plot_cache"]

# Okabe and Ito's palette, told apart by colour-blind readers too: a colour per codec.
PALETTE = ("#0072B2", "#E69F00", "#CC79A7", "#009E73")
COLOURS = dict(zip(dict.fromkeys(arm.codec for arm in ARMS.values()), PALETTE, strict=True))
RIVALS = "#555555"
# Where a label may lie from its point, in points, the first that is free.
PLACES = [
    (dx, dy) for reach in (7, 15, 24, 34, 46) for dx, dy in ((reach, 0), (0, reach), (0, -reach), (-reach, 0))
] + [(sx * reach, sy * reach) for reach in (8, 16, 26, 38) for sx in (1, -1) for sy in (1, -1)]


def plot_cache(rows: list[Row], path: Path, title: str) -> None:
    """Plot a panel each for noise and KL, of the rows that have one, into the PNG ``path``.

    Raises:
        CacheError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    figure_module = optional_package("matplotlib.figure", "plotting")
    agg = optional_package("matplotlib.backends.backend_agg", "plotting")
    figure = figure_module.Figure(figsize=(15, 7), layout="constrained")
    agg.FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    noise, kl = figure.subplots(1, 2)
    for axes, value in ((noise, _noise), (kl, _kl)):
        _panel(axes, [row for row in rows if value(row)], value)
    noise.set_ylabel("gradient noise E|label - p|²")
    kl.set_ylabel("KL(p || label), nats (topk, megatron: tail spread evenly; those that cut columns: infinite)")
    figure.suptitle(f"{title}: down and left is better")
    figure.canvas.draw()  # settles the layout, without which labels have no extent
    for axes, value in ((noise, _noise), (kl, _kl)):
        _label(axes, [row for row in rows if value(row)], value)
    figure.savefig(path, dpi=130, format="png")


def _noise(row: Row) -> float:
    return row.noise


def _kl(row: Row) -> float | None:
    return row.kl


def _panel(axes: Any, rows: list[Row], value: Callable[[Row], Any]) -> None:
    for series in dict.fromkeys(row.series for row in rows):
        points = sorted((row.payload_bytes, value(row)) for row in rows if row.series == series)
        ours = any(row.ours for row in rows if row.series == series)
        axes.plot(*zip(*points, strict=True), label=series, **(_style(series) if ours else _rival_style()))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("payload bytes per token")
    axes.grid(alpha=0.25, which="both")
    axes.margins(0.08)
    axes.legend(loc="best", fontsize=8)


def _style(series: str) -> dict[str, Any]:
    codec = series.partition(",")[0]
    with_table = "prototypes" in series
    marker = "s" if series.endswith("rows") else "D" if "1024" in series else "o"
    colour = COLOURS[codec]
    return {
        "color": colour,
        "marker": marker,
        "ls": "-" if with_table else "--",
        "markerfacecolor": colour if with_table else "white",
        "lw": 1.2,
    }


def _rival_style() -> dict[str, Any]:
    return {"color": RIVALS, "marker": "x", "ls": "", "markersize": 7}


def _label(axes: Any, rows: list[Row], value: Callable[[Row], Any]) -> None:
    """Label points by name, ours by parameter, where the text covers neither another point nor another label."""
    renderer = axes.figure.canvas.get_renderer()
    pixels = axes.transData.transform([(row.payload_bytes, value(row)) for row in rows])
    taken = [axes.get_legend().get_window_extent(renderer)]
    for row, at in zip(rows, pixels, strict=True):
        text = ARMS[row.name].label if row.name in ARMS else row.name
        for place in PLACES:
            label = axes.annotate(
                text,
                (row.payload_bytes, value(row)),
                place,
                textcoords="offset points",
                fontsize=8,
                ha="center" if not place[0] else "left" if place[0] > 0 else "right",
                va="center" if not place[1] else "bottom" if place[1] > 0 else "top",
                color=COLOURS.get(row.series.partition(",")[0], RIVALS),
                arrowprops={"arrowstyle": "-", "lw": 0.5, "alpha": 0.5} if max(map(abs, place)) > 12 else None,
            )
            box = label.get_window_extent(renderer).padded(2)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            hits = sum(box.contains(*other) for other in pixels if tuple(other) != tuple(at))
            if inside and not hits and not any(box.overlaps(other) for other in taken):
                break
            if place is not PLACES[-1]:
                label.remove()
        taken.append(box)
