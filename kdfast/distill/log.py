"""A run's log: a line of JSON per evaluation and per some steps, and TensorBoard's where that is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast._atomic import publish

__all__ = ["LOG", "Log"]

LOG = "log.jsonl"


class Log:
    """Appends to a folder's ``log.jsonl``. Without a folder it writes nothing.

    Args:
        folder: of the run.
        step: that the run goes on from. Lines after it, of a run that was killed, are made again.
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
        """A line. What JSON lacks, such as NaN, is null."""
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
        for stream in (self._file, self._board):
            if stream is not None:
                stream.close()


def _up_to(path: Path, step: int) -> list[str]:
    """The lines until ``step``; a kill may have cut the last one."""
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
