"""A run's log: JSON lines, TensorBoard's events if it is installed, and a picture of the curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast._atomic import publish
from kdfast._optional import import_optional

__all__ = ["LOG", "Log", "plot_curves"]

LOG = "log.jsonl"


class Log:
    """Appends records to a folder's ``log.jsonl`` and to TensorBoard; without a folder it writes nothing.

    Args:
        folder: the run's folder, or None.
        step: the optimiser step from which the run resumes, 0 for a new run. Lines after it, which a killed run has
            left, are dropped: the resumed run writes them again.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._file: Any = None
        self._board: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG
        publish(path, [line.encode() for line in _up_to(path, step)])
        self._file = path.open("a")
        self._board = _board(folder, step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record as a line of JSON. Numbers that JSON lacks, such as NaN, become null."""
        if self._file is None:
            return
        values = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the files."""
        for stream in (self._file, self._board):
            if stream is not None:
                stream.close()


def _up_to(path: Path, step: int) -> list[str]:
    """The lines up to ``step``. A kill may have cut the last one."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > step:
            break
        kept.append(line)
    return kept if step else []


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def plot_curves(
    history: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    metrics: Sequence[str] = ("accuracy", "agreement"),
) -> None:
    """Plot the history of ``Distiller.fit`` by epoch: losses on the left, ``metrics`` on the right.

    Args:
        history: a record per epoch.
        path: the PNG file to write.
        metrics: names in the records. Those that no record has are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("there is nothing to plot in an empty history")
    backend, figures, ticker = (
        import_optional(f"matplotlib.{module}", "plotting curves", extra="demo")
        for module in ("backends.backend_agg", "figure", "ticker")
    )
    figure = figures.Figure(figsize=(10, 4), layout="constrained")
    backend.FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    for axes, names in zip(figure.subplots(1, 2), (("loss", "cross_entropy"), metrics), strict=True):
        for name in names:
            points = [(record["epoch"], record[name]) for record in history if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(Path(path), dpi=150)
