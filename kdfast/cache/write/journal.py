"""The journal beside an unfinished shard: what it holds, so that a killed writer can be resumed.

A journal is a sequence of entries, each a length, a CRC and safetensors. Only entries are ever added, so that a kill
can tear none but the last one. One file serves a writer for its whole life, and is locked as long.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdfast._atomic import with_filename
from kdfast._C import crc32c
from kdfast.cache.errors import CacheBusyError

__all__ = ["Journal", "write_at"]

FRAME = np.dtype([("length", "<u4"), ("crc", "<u4")])
_open: weakref.WeakSet[Journal] = weakref.WeakSet()


class Journal:
    """The journal of one writer, created if it is not there, and locked.

    Raises:
        CacheBusyError: another writer, alive, has it.
        OSError: it cannot be opened or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0
        self._descriptor = -1
        self._descriptor = _lock(path)
        _open.add(self)

    def entries(self) -> Iterator[tuple[str, dict[str, Tensor], int]]:
        """Yield kind, contents and end offset of every entry, up to the first that is torn or corrupt."""
        with with_filename(self.path), open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            data = file.read()
        end = 0
        while (entry := _parse(memoryview(data)[end:])) is not None:
            kind, contents, length = entry
            end += length
            yield kind, contents, end

    def append(self, kind: str, contents: Mapping[str, Tensor]) -> None:
        """Add an entry. After an ``OSError`` it is not there, and the call can be repeated."""
        body = kind.encode() + save(dict(contents))
        length = np.uint32(len(body)).astype("<u4").tobytes()
        crc = np.uint32(crc32c(body, crc32c(length))).astype("<u4").tobytes()
        with with_filename(self.path):
            write_at(self._descriptor, length + crc + body, self._end)
        self._end += FRAME.itemsize + len(body)

    def cut(self, end: int) -> None:
        """Drop everything from the offset ``end`` on; the next entry goes there."""
        with with_filename(self.path):
            os.ftruncate(self._descriptor, end)
        self._end = end

    @property
    def empty(self) -> bool:
        """Whether the journal has no entry."""
        return os.fstat(self._descriptor).st_size == 0

    def __del__(self) -> None:
        self.close(remove=False)

    def close(self, *, remove: bool) -> None:
        """Unlock the journal, and remove it if asked. A second call does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                if remove:
                    self.path.unlink(missing_ok=True)
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for the copies that forked processes may have
                os.close(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data``. A single ``pwrite`` writes less where data are large, or the disk nearly full."""
    rest = memoryview(data)
    while len(rest):
        done = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[done:], offset + done


def _parse(data: memoryview) -> tuple[str, dict[str, Tensor], int] | None:
    """Kind, contents and length of the first entry of ``data``; None if it is torn or corrupt."""
    if len(data) < FRAME.itemsize:
        return None
    length, crc = np.frombuffer(data, FRAME, 1)[0].tolist()
    body = data[FRAME.itemsize : FRAME.itemsize + length]
    if len(body) != length or not length or crc32c(body, crc32c(data[:4])) != crc:
        return None
    try:
        return chr(body[0]), load(bytes(body[1:])), FRAME.itemsize + length
    except SafetensorError:
        return None


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with with_filename(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise CacheBusyError(f"{path} belongs to a writer at work: give each writer its own name") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has just removed it


def _forget() -> None:
    """Close the journals in a forked child, which must not hold the lock of a parent that has died."""
    for journal in list(_open):
        if journal._descriptor >= 0:
            os.close(journal._descriptor)
            journal._descriptor = -1


os.register_at_fork(after_in_child=_forget)
