"""Checkpoints of a run: ``last.pt``, from which it resumes, and ``best.pt``, its best student so far.

A file appears whole or not at all, and reading it runs no code that is in it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._atomic import publish
from kdfast.distill import parallel
from kdfast.distill.state import Position, random_state, set_random_state

__all__ = ["Best", "Checkpointer", "load", "monitored", "restore", "save"]

LAST, BEST = "last.pt", "best.pt"
VERSION = 1
RENAMED = {"tally": "train_state"}  # parts by the names that older checkpoints have for them

LESS_IS_BETTER = ("loss", "cross_entropy", "ece")


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers, strings, and lists, tuples and dicts of these.

    Raises:
        OSError: it cannot be written, with the file's name. The file that was there before is unchanged.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **content}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, [buffer.getvalue()])


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises ``ValueError`` for a file that is none, or an unknown version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"{path} is not a checkpoint of version {VERSION}")
    return content


def restore(what: str, holder: Any, state: Any, path: Path) -> None:
    """Call ``holder.load_state_dict(state)``. Raises ``ValueError`` if it does not fit, naming file and part."""
    try:
        holder.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is of another {what} ({error}); resume=False, or another folder, starts over"
        ) from error


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
        others: the run's other parts by name. Parts without a ``state_dict`` are left out.
    """

    def __init__(self, folder: Path | None, student: nn.Module, position: Position, **others: Any) -> None:
        self._path = None if folder is None else folder / LAST
        self._student, self._position = student, position
        parts = {"student": parallel.unwrap(student), **others}
        self._parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def save(self) -> None:
        """Write the checkpoint. Raises ``OSError`` with the file's name; the last checkpoint is then unchanged."""
        if self._path is None:
            return
        parallel.broadcast_module(self._student, buffers_only=True)
        mine = {"random": random_state(self._position.generators), "position": self._position.state_dict()}
        processes = parallel.all_gather_object(mine)
        if parallel.is_first():
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            save(self._path, {**parts, "processes": processes})

    def resume(self) -> None:
        """Restore the run's parts from the checkpoint, if there is one.

        Raises:
            ValueError: the checkpoint is of another student, objective, optimizer or loader, naming file and part.
        """
        if self._path is None or not parallel.broadcast_object(self._path.exists()):
            return
        content = {RENAMED.get(name, name): part for name, part in load(self._path).items()}
        if set(self._parts) != set(content) - {"version", "processes"}:
            raise ValueError(
                f"{self._path} holds {', '.join(content)}, but this run has {', '.join(self._parts)}: it is of "
                "another run; resume=False, or another folder, starts over"
            )
        for name, part in self._parts.items():
            restore(name, part, content[name], self._path)
        processes = content["processes"]
        mine = processes[parallel.rank() % len(processes)]
        restore("loader", self._position, mine["position"], self._path)
        set_random_state(mine["random"], self._position.generators)

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
            self._keep(record)

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
            restore("student", self._student, load(self._path)["student"], self._path)

    def _keep(self, record: dict[str, Any]) -> None:
        if self._path is None:
            self._kept = _copy_of(self._student.state_dict()) if self._patience is not None else None
        elif parallel.is_first():
            save(self._path, {"student": self._student.state_dict(), "record": record})

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
