"""Runs, and where they are kept: one line of JSON each, added when the run is done."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["FINAL", "TUNING", "Options", "ResultsError", "Run", "RunKey", "Store", "read_runs"]

TUNING, FINAL = "tuning", "final"  # scored on the validation split, or on the test split

Options = Mapping[str, Any]
RunKey = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Run:
    """One arm under one seed and one choice of its options."""

    arm: str
    stage: str
    seed: int
    options: Options
    settings: str  # their fingerprint
    scores: Mapping[str, float] = field(default_factory=dict)  # by test, in 0 ... 1; empty: not run yet
    about: Mapping[str, Any] = field(default_factory=dict)  # seconds, machine, versions, commit

    @property
    def key(self) -> RunKey:
        """Equal for runs that need not both be made."""
        return self.settings, self.arm, self.stage, self.seed, json.dumps(dict(self.options), sort_keys=True)


class ResultsError(ValueError):
    """A file of results cannot be used. The message names it."""


def read_runs(path: Path) -> list[Run]:
    """The runs in ``path`` in the order in which they ended; none if there is no such file.

    A last line without its end is left by a killed writer and does not count.

    Raises:
        ResultsError: another line is not a run.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


class Store:
    """The runs of one file, and the right to add to it, which one process has at a time.

    A line is on disk before ``append`` returns, so a kill costs the runs under way and no other.

    Raises:
        ResultsError: another process has it, or a line of it is not a run.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.runs: dict[RunKey, Run] = {run.key: run for run in read_runs(path)}
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise ResultsError(f"{path} is being written by another process") from error
            raise

    def append(self, run: Run) -> None:
        self._file.write(json.dumps(asdict(run), allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.runs[run.key] = run

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _parse(path: Path, number: int, line: bytes) -> Run:
    try:
        return Run(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ResultsError(f"{path}, line {number} is not a run: {error}") from error
