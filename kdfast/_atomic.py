"""A file appears whole or not at all, and stays after a power cut."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["publish", "sync_directory", "with_filename"]


def publish(path: Path, chunks: Iterable[bytes]) -> None:
    """Write ``chunks`` to a ``.part`` file beside ``path``, sync it, rename it to ``path``, sync the directory.

    Raises:
        OSError: with the file's name; ``path`` is then as it was, unless only the last sync failed.
    """
    # The name is unique, so that two processes never write one file; readers look only at the final names.
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    with with_filename(path):
        try:
            with part.open("xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory as lasting as the files they name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Give an ``OSError`` the file it is about: ``write`` and ``fsync`` know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno or 0), str(path)) from error
