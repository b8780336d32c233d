"""What a path of the caller's means, decided once: when it is handed in."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["local_path"]


def local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as an absolute one, with ``~`` and ``~user`` replaced by the home: it means the same after a chdir.

    Links are left as they are.
    """
    return Path(path).expanduser().absolute()
