"""The journal beside an unfinished shard: what it holds, so that a killed writer can be resumed.

A journal is a sequence of entries, each a length, a CRC and safetensors. Only entries are ever added, so that a kill
can tear none but the last one. One file serves a writer for its whole life, and is locked as long.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdfast._atomic import part_of, replacing, with_filename
from kdfast._C import crc32c
from kdfast.cache.errors import CacheBusyError, CacheCorruptError, CacheError

__all__ = ["Entry", "Journal", "is_alive", "open_own", "write_at"]

FRAME = np.dtype([("length", "<u4"), ("crc", "<u4")])
Entry = tuple[str, Mapping[str, Tensor]]  # its kind and its contents
_open: weakref.WeakSet[Journal] = weakref.WeakSet()


class Journal:
    """The journal of one writer, created if it is not there, and locked.

    Raises:
        CacheBusyError: another writer, alive, has it.
        CacheError: it is a link, or no regular file.
        OSError: it cannot be opened or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0
        self._descriptor = -1
        self._descriptor = _lock(path)
        _open.add(self)

    def entries(self) -> Iterator[tuple[str, dict[str, Tensor], int]]:
        """Yield kind, contents and end offset of every entry, up to the first that is torn or corrupt.

        Raises:
            CacheCorruptError: not even the first entry is what was written, and no kill can have torn it.
        """
        with with_filename(self.path), open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            data = file.read()
        if data and _parse(memoryview(data)) is None and not self._is_torn(data):
            raise CacheCorruptError(
                f"{self.path}: its first entry is not what was written, and without it the others cannot be read: "
                "restore the file, or move it and the .part files of this writer away to give up what they hold"
            )
        end = 0
        while (entry := _parse(memoryview(data)[end:])) is not None:
            kind, contents, length = entry
            end += length
            yield kind, contents, end

    def _is_torn(self, data: bytes) -> bool:
        """Whether a kill can have left ``data``: a first entry alone, cut short before its shard had a part file."""
        writer = self.path.name.removesuffix(".journal")
        parts = [part for part in self.path.parent.glob(f"{writer}-*.safetensors.part") if part.stat().st_size]
        length = int(np.frombuffer(data, "<u4", 1)[0]) if len(data) >= FRAME.itemsize else len(data)
        return len(data) < FRAME.itemsize + length and not parts

    def append(self, kind: str, contents: Mapping[str, Tensor]) -> None:
        """Add an entry. After an ``OSError`` it is not there, and the call can be repeated."""
        data = _bytes_of(kind, contents)
        with with_filename(self.path):
            write_at(self._descriptor, data, self._end)
        self._end += len(data)

    def start_over(self, entries: Sequence[Entry]) -> None:
        """Replace everything by ``entries``, at once: after a kill the journal is the old one or the new one.

        After an ``OSError`` it is the old one.
        """
        data = b"".join(_bytes_of(*entry) for entry in entries)
        part = part_of(self.path)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with with_filename(part):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write_at(descriptor, data, 0)
                os.replace(part, self.path)
        except BaseException:
            os.close(descriptor)
            part.unlink(missing_ok=True)
            raise
        old, self._descriptor, self._end = self._descriptor, descriptor, len(data)
        os.close(old)

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


def open_own(path: Path, flags: int) -> int:
    """Open a file that only a writer makes. Raises ``CacheError`` for a link, or for what is no regular file.

    Whoever may write in the directory could otherwise have a writer cut a file that lies elsewhere. A file that has
    other names, as a backup of hard links gives it, is left to these, and a copy takes its place.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheError(f"{path} is a symbolic link, which no writer makes: remove it") from error
        raise
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise CacheError(f"{path} is no regular file, which no writer makes: remove it")
    with replacing(path) as part:
        shutil.copyfile(path, part, follow_symlinks=False)
    return open_own(path, flags)


def is_alive(path: Path) -> bool:
    """Whether a writer holds the journal at ``path``."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for the copies that forked processes may have
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _bytes_of(kind: str, contents: Mapping[str, Tensor]) -> bytes:
    body = kind.encode() + save(dict(contents))
    length = np.uint32(len(body)).astype("<u4").tobytes()
    return length + np.uint32(crc32c(body, crc32c(length))).astype("<u4").tobytes() + body


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
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
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
