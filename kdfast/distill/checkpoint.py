"""Checkpoints of a run: ``last.pt``, from which it resumes, and ``best.pt``, its best student so far.

A file appears whole or not at all, and reading it runs no code that is in it.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._atomic import publish
from kdfast._paths import local_path
from kdfast.distill import parallel
from kdfast.distill.identity import Identity, check_same_run, tell
from kdfast.distill.position import Position
from kdfast.distill.state import TrainState, random_state, set_random_state

__all__ = ["Best", "CheckpointError", "Checkpointer", "load", "load_best", "monitored", "restore", "save"]

LAST, BEST = "last.pt", "best.pt"
VERSION = 1
RENAMED = {"tally": "train_state"}  # parts by the names that older checkpoints have for them

START_OVER = "; resume=False, or another folder, starts over"
LESS_IS_BETTER = ("loss", "cross_entropy", "ece")


# A checkpoint is a zip file; the comment at its end holds a checksum of all bytes before the comment.
MARK, DIGEST_BYTES = b"kdfast blake2b ", 16
COMMENT_BYTES = len(MARK) + 2 * DIGEST_BYTES
LENGTH_BYTES = 2  # of the comment's length, which are a zip file's last bytes where it has no comment
PIECE_BYTES = 2**24  # of a file that is read for its checksum
CHECKED = "checked"  # is in a checkpoint that has a checksum


class CheckpointError(ValueError):
    """Raised for a checkpoint that is damaged, or no checkpoint. The message names the file and says what to do."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers, strings, and lists, tuples and dicts of these.

    ``torch.load(path, weights_only=True)`` reads it, too, without looking at its checksum.

    Raises:
        OSError: it cannot be written, with the file's name. The file that was there before is unchanged.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    body: Any = buffer.getbuffer()[:-LENGTH_BYTES]
    length = COMMENT_BYTES.to_bytes(LENGTH_BYTES, "little")
    checksum = blake2b(body, digest_size=DIGEST_BYTES)
    checksum.update(length)
    publish(path, [body, length, MARK + checksum.hexdigest().encode()])


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, and check that it is undamaged.

    Raises:
        CheckpointError: it is damaged, no checkpoint, or one of an unknown version.
        OSError: it cannot be read.
    """
    content = _read(path)
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a checkpoint of version {VERSION}{START_OVER}")
    if isinstance(content.get("student"), dict):  # older ones name the parts of a compiled student by its wrapper, too
        content["student"] = {name.replace("_orig_mod.", ""): x for name, x in content["student"].items()}
    return content


def load_best(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a run's best student, and check that they are undamaged::

        student.load_state_dict(kdfast.distill.load_best("run"))

    Args:
        path: a run's folder, or its ``best.pt``.

    Returns:
        The student's ``state_dict``, on the CPU.

    Raises:
        CheckpointError: the file is damaged, or no checkpoint.
        FileNotFoundError: there is none: ``fit`` writes it with a ``folder``, an ``eval_loader`` or a monitored loss.
    """
    path = local_path(path)
    content = _read(path / BEST if path.is_dir() else path)
    old = set(content) == {"version", "student", "record"}  # the form before 1.0
    return content["student"] if old else content


def _read(path: Path) -> dict[str, Any]:
    checked = _has_right_checksum(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        if not path.exists():
            raise
        raise CheckpointError(f"{path} is not a checkpoint, or one that was cut: {error}{START_OVER}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}{START_OVER}")
    if content.pop(CHECKED, False) and not checked:
        raise CheckpointError(f"{path} is damaged: its checksum is missing{START_OVER}")
    return content


def _has_right_checksum(path: Path) -> bool:
    """Whether a file has a checksum, which is then right. Older files have the zip format's own, part by part.

    Raises:
        CheckpointError: a checksum is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - COMMENT_BYTES))
        comment = file.read()
        if not comment.startswith(MARK):
            file.seek(0)
            if zipfile.is_zipfile(file):
                _check_parts(path)
            return False
        file.seek(0)
        checksum = blake2b(digest_size=DIGEST_BYTES)
        for piece in _pieces(file, size - COMMENT_BYTES):
            checksum.update(piece)
    if comment != MARK + checksum.hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: its checksum does not fit what it holds{START_OVER}")
    return True


def _pieces(file: Any, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = file.read(min(size, PIECE_BYTES))
        if not piece:
            return
        size -= len(piece)
        yield piece


def _check_parts(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}{START_OVER}") from error
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {bad} is wrong{START_OVER}")


def restore(what: str, holder: Any, state: Any, path: Path) -> None:
    """Call ``holder.load_state_dict(state)``. Raises ``ValueError`` if it does not fit, naming file and part."""
    with _naming(what, path):
        holder.load_state_dict(state)


@contextmanager
def _naming(what: str, path: Path) -> Iterator[None]:
    """A context whose errors say that ``path`` is of another ``what``."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is of another {what} ({error}){START_OVER}") from error


def _copy_of(state: Any) -> Any:
    """A state dict with copies of its tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    return {name: _copy_of(value) for name, value in state.items()} if isinstance(state, dict) else state


class Checkpointer:
    """Writes and reads a run's ``last.pt``; without a folder it does nothing.

    With several processes rank 0 writes the random states of all of them, and all of them read: they must share the
    folder.

    Args:
        folder: the run's folder, or None.
        student: the student as it is called, wrapped in DDP if it is.
        position: the place in the loader.
        identity: which run it is; of the first process alone.
        epochs: the number of epochs that the run was asked for.
        train_state: how far it is.
        best: its best student.
        others: the run's other parts by name. Parts without a ``state_dict`` are left out.
    """

    def __init__(
        self,
        folder: Path | None,
        student: nn.Module,
        position: Position,
        *,
        identity: Identity | None,
        epochs: int,
        train_state: TrainState,
        best: Best,
        **others: Any,
    ) -> None:
        self._path = None if folder is None else folder / LAST
        self._identity, self._epochs, self._state = identity, epochs, train_state
        self._student, self._position = student, position
        parts = {"student": parallel.unwrap(student), **others, "train_state": train_state, "best": best}
        self._parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self._best, self._is_new = best, True

    @property
    def path(self) -> Path | None:
        """The checkpoint's file; None without a folder."""
        return self._path

    def save(self) -> None:
        """Write the checkpoint. Raises ``OSError`` with the file's name; the last checkpoint is then unchanged."""
        if self._path is None:
            return
        parallel.broadcast_module(self._student, buffers_only=True)
        mine = {"random": random_state(self._position.generators), "position": self._position.state_dict()}
        processes = parallel.all_gather_object(mine)
        if parallel.is_first():
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            about = {"version": VERSION, CHECKED: True, "description": self._texts()}
            if self._is_new and self._best.value is None:  # what lies there is the best student of another run
                self._path.with_name(BEST).unlink(missing_ok=True)
            save(self._path, {**about, **parts, "processes": processes})
            self._is_new = False

    def resume(self) -> None:
        """Restore the run's parts from the checkpoint, if there is one.

        Raises:
            CheckpointError: the checkpoint is damaged.
            ValueError: it is of another run, naming the file and all that differs.
        """
        if self._path is None or not parallel.broadcast_object(self._path.exists()):
            return
        content = {RENAMED.get(name, name): part for name, part in load(self._path).items()}
        held = set(content) - {"version", "processes", "description"}
        if set(self._parts) != held:
            raise ValueError(
                f"{self._path} holds {', '.join(sorted(held))}, but this run has {', '.join(sorted(self._parts))}: it "
                f"is of another run{START_OVER}"
            )
        processes = content["processes"]
        mine = processes[parallel.rank() % len(processes)]
        with _naming("loader", self._path):
            self._position.check_state(mine["position"])
        self._check_same_run(self._path, content)
        for name, part in self._parts.items():
            restore(name, part, content[name], self._path)
        restore("loader", self._position, mine["position"], self._path)
        set_random_state(mine["random"], self._position.generators)
        self._is_new = False
        state, epochs = self._state, self._epochs
        place = f", step {state.step}" if state.updates else ""
        left = ": nothing left to train" if state.epoch >= epochs else ": stopped early" if state.stopped else ""
        tell(f"resumed {self._path} at epoch {state.epoch + bool(state.updates)} of {epochs}{place}{left}")

    def _check_same_run(self, path: Path, content: Mapping[str, Any]) -> None:
        """Compare descriptions in the first process, which has written the other one; all raise what it finds."""
        message = None
        if parallel.is_first():
            state = TrainState(**content["train_state"])
            then = content.get("description")
            if then is None:
                warnings.warn(
                    f"{path} does not say which run it is of, as checkpoints before 1.0: it is resumed without a "
                    "comparison of options, teacher and data",
                    stacklevel=2,
                )
            now = self._texts()
            try:
                check_same_run(path, now if then is None else then, now, state, self._epochs)
            except ValueError as error:
                message = str(error)
            if self._identity is not None:
                self._identity.keep_moving(then or {})
        message = parallel.broadcast_object(message)
        if message is not None:
            raise ValueError(message)

    def _texts(self) -> dict[str, str]:
        return {} if self._identity is None else self._identity.texts()

    def describe(self) -> str:
        """Where the last checkpoint is, as a clause of an error message."""
        if self._path is None:
            return "no checkpoint was asked for (folder=...)"
        return f"the last checkpoint is {self._path}" if self._path.exists() else "no checkpoint had been written yet"


class Best:
    """Keeps the weights of the student whose ``monitor`` is best: in ``folder``, or in memory without a folder.

    Args:
        student: the student.
        monitor: the name of a number in the epochs' records. Higher is better, except for loss, cross_entropy and ece,
            and for a name with a minus before it.
        patience: the number of evaluations without improvement after which training stops. With None it does not
            stop, and nothing is kept in memory.
        folder: the run's folder, or None.

    Raises:
        ValueError: ``patience`` is less than 1.
    """

    def __init__(self, student: nn.Module, monitor: str, patience: int | None, folder: Path | None) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self._student, self._patience = student, patience
        self._name = monitor.removeprefix("-")
        self._less = monitor.startswith("-") or monitor in LESS_IS_BETTER
        self._path = None if folder is None else folder / BEST
        self._kept: Any = None
        self.value: float | None = None
        self.stale = 0

    def offer(self, record: dict[str, Any]) -> None:
        """Keep the student if this record is the best. Raises ``ValueError`` if it lacks the monitored number."""
        if self._patience is None and self._name not in record:
            return
        found = monitored(record, self._name)
        value = -found if self._less else found
        self.stale += 1
        if value == value and (self.value is None or value > self.value):
            self.value, self.stale = value, 0
            self._keep()

    @property
    def out_of_patience(self) -> bool:
        """Whether the last ``patience`` evaluations brought no improvement."""
        return self._patience is not None and self.stale >= self._patience

    def restore(self) -> None:
        """Load the best weights into the student; without ``patience``, or before any evaluation, do nothing."""
        if self._patience is None or self.value is None:
            return
        if self._path is None:
            self._student.load_state_dict(self._kept)
        else:
            parallel.barrier()
            restore("student", self._student, load_best(self._path), self._path)

    def _keep(self) -> None:
        if self._path is None:
            self._kept = _copy_of(self._student.state_dict()) if self._patience is not None else None
        elif parallel.is_first():
            save(self._path, self._student.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The best value, and the number of evaluations since then."""
        return {"value": self.value, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore value and count from ``state_dict``."""
        self.value, self.stale = state["value"], state["stale"]


def monitored(record: dict[str, Any], monitor: str) -> float:
    """The number in a record that ``monitor`` names, without its minus. Raises ``ValueError`` if there is none."""
    name = monitor.removeprefix("-")
    if name not in record:
        raise ValueError(f"monitor {name!r} is none of {', '.join(record)}")
    return float(record[name])
