"""What a path of the caller's means, decided once: when it is handed in."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["SHORTENED", "local_folder", "local_path"]

SHORTENED = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")  # a URL that has been a Path


def local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as an absolute one, with ``~`` and ``~user`` replaced by the home: it means the same after a chdir.

    Links are left as they are.

    Raises:
        TypeError: it is no text and no path.
        ValueError: it is a URL, of which a local folder would be made, or ``~user`` is nobody's home.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a path must be a text or a Path, got {text!r}: os.fsdecode makes a text of it")
    if "://" in text or (SHORTENED.match(text) and not os.path.lexists(text.split("/")[0])):
        raise ValueError(f"{text} is a URL, and this has to be a local path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{text}: {text.split('/')[0]} is nobody's home") from error


def local_folder(path: str | os.PathLike[str] | None) -> Path | None:
    """``local_path(path)``; None for None."""
    return None if path is None else local_path(path)
