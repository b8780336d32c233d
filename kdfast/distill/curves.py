"""A run's curves as a PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_curves"]


def plot_curves(
    history: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    metrics: Sequence[str] = ("accuracy", "agreement"),
) -> None:
    """Draw what ``Distiller.fit`` returned: losses on the left, ``metrics`` on the right, by epoch.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("there is nothing to plot in an empty history")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('curves need matplotlib: pip install "kdfast[demo]"') from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    for axes, names in zip(figure.subplots(1, 2), (("loss", "cross_entropy"), metrics), strict=True):
        for name in names:
            points = [(record["epoch"], record[name]) for record in history if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(Path(path), dpi=150)
