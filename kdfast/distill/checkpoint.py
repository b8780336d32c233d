"""Checkpoints: files that appear whole, and are read without running what is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast._atomic import publish

__all__ = ["BEST", "LAST", "load", "restore", "save"]

LAST, BEST = "last.pt", "best.pt"
VERSION = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``, which holds tensors, numbers, strings and lists, tuples and dicts of these, as one file.

    Raises:
        OSError: with the file's name; the file that was there is as it was.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **content}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, [buffer.getvalue()])


def load(path: Path) -> dict[str, Any]:
    """What ``save`` wrote, on the CPU. Raises ``ValueError`` for another file, or a version that is not known."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"{path} is not a checkpoint of version {VERSION}")
    return content


def restore(what: str, holder: Any, state: Any, path: Path) -> None:
    """``holder.load_state_dict(state)``. Raises ``ValueError`` where they do not fit, naming file and part."""
    try:
        holder.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is of another {what} ({error}); resume=False, or another folder, starts anew"
        ) from error


def copy_of(state: Any) -> Any:
    """A state's tensors as they are now."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    return {name: copy_of(value) for name, value in state.items()} if isinstance(state, dict) else state
