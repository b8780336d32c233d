"""Opening files that others have put there: regular files alone, never a pipe or a device, which would not end."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdfast._atomic import with_filename
from kdfast.cache.errors import CacheCorruptError

__all__ = ["map_file", "open_regular", "read_regular"]


def open_regular(path: Path) -> BinaryIO:
    """Open the regular file at ``path``, or the one that a link there names, for reading.

    Raises:
        CacheCorruptError: a directory, a pipe, a socket or a device is there. None of them is opened.
        OSError: the file cannot be opened.
    """
    with with_filename(path):
        _require_regular(path, os.stat(path).st_mode)
        # Another one may have taken its place: a pipe does not block, and what has been opened is looked at again.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of the regular file at ``path``.

    Raises:
        CacheCorruptError: it is no regular file, or longer than ``limit``.
        OSError: it cannot be read.
    """
    with with_filename(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CacheCorruptError(f"{path}: is longer than the {limit} bytes that such a file can have")
        return file.read(size)  # not the limit: Python makes room for as much as is asked for


def map_file(path: Path) -> NDArray[np.uint8]:
    """The regular file at ``path``, mapped into memory.

    Raises:
        CacheCorruptError: it is no regular file, or empty.
        OSError: it cannot be opened or mapped.
    """
    with with_filename(path), open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise CacheCorruptError(f"{path}: is empty")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CacheCorruptError(f"{path}: is no regular file")
