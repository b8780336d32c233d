"""Atomic, durable files: one appears whole or not at all, and stays after a power cut."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["part_of", "publish", "publish_new", "replacing", "sync_directory", "with_filename"]

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)  # what file systems without hard links say


def publish(path: Path, chunks: Iterable[bytes]) -> None:
    """Write ``chunks`` to a new file that replaces ``path``, whole or not at all, and survives a power cut.

    Raises:
        OSError: with the file's name; ``path`` is then as it was, unless only the directory could not be synced.
    """
    with replacing(path) as part, with_filename(path), part.open("xb") as file:
        file.writelines(chunks)


def publish_new(path: Path, data: bytes) -> bool:
    """Write a new file ``path``, as ``publish`` does, unless there is one. Returns whether this one is there.

    Of several processes that call it at once, one gets True.

    Raises:
        OSError: with the file's name.
    """
    part = part_of(path)
    with with_filename(path):
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _rename_new(part, path)
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)
        sync_directory(path.parent)
    return True


def _rename_new(part: Path, path: Path) -> None:
    """Give ``part`` the name ``path``. Raises ``FileExistsError`` if there is such a file."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(part, path)


def part_of(path: Path) -> Path:
    """Where a file is written that will be called ``path``."""
    # The name is unique, so that two processes never write one file; readers look only at the final names.
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A context manager that gives a path to write at, beside ``path``, and at its end renames that file to ``path``.

    If the body raises, the new file is removed and ``path`` stays as it was.

    Args:
        sync: sync the file before it is renamed, and the directory afterwards: the new file survives a power cut.

    Raises:
        OSError: the new file cannot be synced or renamed; with the file's name.
    """
    part = part_of(path)
    try:
        yield part
        with with_filename(path):
            if sync:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if sync:
        with with_filename(path):
            sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync a directory, so that the names in it survive a power cut as their files do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """A context that adds ``path`` to an ``OSError`` without a file name: ``fsync`` knows only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno or 0), str(path)) from error
