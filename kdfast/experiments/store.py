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
    """One training of an arm, with one seed and one choice of its options.

    Attributes:
        arm: its name.
        stage: ``TUNING`` or ``FINAL``.
        seed: of the task and the training.
        options: the arm's.
        settings: their fingerprint.
        scores: accuracies by the test's name, in 0 ... 1; empty before the run.
        about: seconds, machine, versions, commit.
    """

    arm: str
    stage: str
    seed: int
    options: Options
    settings: str
    scores: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> RunKey:
        """What a run is found by in a file: equal keys mean that one run serves for both."""
        return self.settings, self.arm, self.stage, self.seed, json.dumps(dict(self.options), sort_keys=True)


class ResultsError(ValueError):
    """Raised where a file of results cannot be used. The message names the file."""


def read_runs(path: Path) -> list[Run]:
    """Read the runs in ``path``, in the order in which they ended; none if there is no such file.

    A last line without a newline is what a killed process has left, and is ignored.

    Raises:
        ResultsError: another line is not a run.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


class Store:
    """A file of runs, locked for writing by one process at a time, as a context manager.

    A line is on disk before ``append`` returns, so that a kill loses only the runs that have not ended.

    Attributes:
        runs: those in the file, by key.

    Raises:
        ResultsError: another process writes to the file, or a line of it is not a run.
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
        """Write a run, and wait until it is on disk."""
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
