"""What can be wrong with a cache. Failing disks raise ``OSError`` with the file's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CacheBusyError", "CacheCorruptError", "CacheError", "CacheMismatchError", "naming"]


class CacheError(ValueError):
    """A cache cannot be read or written as asked."""


class CacheCorruptError(CacheError):
    """Bytes on disk are not the bytes that were written. The message names the shard, and the block if it is one."""


class CacheBusyError(CacheError):
    """A writer of the same name is at work in the directory."""


class CacheMismatchError(CacheError):
    """Two parts of a cache, or a cache and its writer, differ in codec, vocabulary, temperatures or teacher."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` the file it is about: ``write`` and ``fsync`` know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno or 0), str(path)) from error
