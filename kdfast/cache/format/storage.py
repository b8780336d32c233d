"""Where a cache's files lie: a directory, or any place that fsspec has a URL for."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

from kdfast._atomic import publish, publish_new, replacing, sync_directory, with_filename
from kdfast._paths import SHORTENED, local_path
from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.regular import open_regular

__all__ = ["LocalStorage", "RemoteStorage", "Storage", "open_storage"]

CHUNK = 8 * 2**20  # of a file on its way into the cache
MOST_READ = 2**32  # bytes of a file that is read whole: a manifest, or a table beside the shards
TAIL = 8  # a shard ends with its seal, which tells it from another shard of its size


def open_storage(path: str | os.PathLike[str], *, local: str | os.PathLike[str] | None = None) -> Storage:
    """The storage that ``path`` names.

    Args:
        path: a directory, or a URL that fsspec knows: ``s3://bucket/cache``, ``memory://cache``. ``file://`` is local.
            ``~`` is the home, and a relative path is resolved now: the storage stays where it is when the process
            changes its directory.
        local: the folder for downloaded files of a remote cache. The user's cache folder if None.

    Raises:
        ValueError, ImportError: fsspec does not know the protocol, or lacks the package that serves it; or a URL has
            gone through a ``Path``, which drops a slash.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or "://" not in text:
        if isinstance(text, str) and SHORTENED.match(text) and not os.path.lexists(text.split("/")[0]):
            raise ValueError(
                f"{text} seems to be a URL that a Path has shortened: pass {text.replace(':/', '://', 1)!r}"
            )
        return LocalStorage(local_path(text))
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    fs, root = url_to_fs(text)
    if "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol):
        return LocalStorage(local_path(root))
    return RemoteStorage(text, fs, root, None if local is None else local_path(local))


class Storage(ABC):
    """The files of one cache, by name. A failing disk or network raises ``OSError``."""

    url: str

    @abstractmethod
    def list(self) -> list[str]:
        """The names of all files, sorted. Raises ``FileNotFoundError`` if the directory is not there."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def size(self, name: str) -> int:
        """A file's size in bytes."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking. Of a remote file only what is read is fetched, or little more.

        Raises:
            CacheCorruptError: it is no regular file.
        """

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a whole, small file.

        Raises:
            CacheCorruptError: it is no regular file, or longer than ``MOST_READ``.
        """
        with self.open(name) as file:
            size = self.size(name)
            data = file.read(size) if size <= MOST_READ else b""  # Python makes room for as much as is asked for
        if size > MOST_READ:
            raise CacheCorruptError(f"{self.describe(name)}: is longer than the {MOST_READ} bytes that it can have")
        return data

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A local copy of the file ``name``, which never changes. It is downloaded once; size and end are checked."""

    @abstractmethod
    def create(self) -> None:
        """Make the cache's directory, if it is not there."""

    @abstractmethod
    def publish(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a small file, whole or not at all. A file of this name is replaced."""

    @abstractmethod
    def publish_new(self, name: str, data: bytes) -> bool:
        """Write a small file, whole or not at all, unless there is one of this name. Returns whether it is this one."""

    @abstractmethod
    def add(self, file: Path, name: str) -> None:
        """Copy a finished local file into the cache, whole or not at all. A file of this name is replaced."""

    @abstractmethod
    def deliver(self, file: Path, name: str) -> None:
        """Move a finished local file into the cache, whole or not at all. It stays in its place until it has arrived.

        Raises:
            CacheError: there is a file of this name already.
        """

    def describe(self, name: str) -> str:
        """The path or URL of the file ``name``, for error messages."""
        return f"{self.url.rstrip('/')}/{name}"

    def _require_absent(self, name: str) -> None:
        if self.exists(name):
            raise CacheError(
                f"{self.describe(name)} appeared while this writer was at work: give each writer its own name"
            )


class LocalStorage(Storage):
    """A cache in a local directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = str(directory)

    def list(self) -> list[str]:
        return sorted(entry.name for entry in self.directory.iterdir())

    def exists(self, name: str) -> bool:
        return (self.directory / name).exists()

    def size(self, name: str) -> int:
        return (self.directory / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        return open_regular(self.directory / name)

    def fetch(self, name: str) -> Path:
        return self.directory / name

    def create(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def publish(self, name: str, chunks: Iterable[bytes]) -> None:
        publish(self.directory / name, chunks)

    def publish_new(self, name: str, data: bytes) -> bool:
        return publish_new(self.directory / name, data)

    def add(self, file: Path, name: str) -> None:
        publish(self.directory / name, _chunks(file))

    def deliver(self, file: Path, name: str) -> None:
        path = self.directory / name
        with with_filename(path):
            if file.exists() or not path.exists():  # else it is there, but the directory could not be synced
                self._require_absent(name)
                os.replace(file, path)
            sync_directory(self.directory)


class RemoteStorage(Storage):
    """A cache behind an fsspec URL. A file appears there by one complete PUT."""

    def __init__(self, url: str, fs: Any, root: str, local: Path | None = None) -> None:
        self.url = url
        self._fs, self._root = fs, root.rstrip("/")
        self._local = default_folder() / digest(url) if local is None else local

    def list(self) -> list[str]:
        self._fs.invalidate_cache()  # other writers add files
        if not self._fs.exists(self._root):
            raise FileNotFoundError(2, "No such directory", self.url)
        entries = self._fs.ls(self._root, detail=True)
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int:
        return int(self._fs.size(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._fs.open(self._path(name), "rb"))

    def fetch(self, name: str) -> Path:
        path, size = self._local / name, self.size(name)
        if path.exists() and path.stat().st_size == size and _tail(path) == self._tail(name, size):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as part:
            self._fs.get_file(self._path(name), str(part))
            if (found := part.stat().st_size) != size:
                raise OSError(f"{self.describe(name)}: {size} bytes announced, {found} downloaded to {path.parent}")
        return path

    def create(self) -> None:
        self._fs.makedirs(self._root, exist_ok=True)

    def publish(self, name: str, chunks: Iterable[bytes]) -> None:
        self._fs.pipe_file(self._path(name), b"".join(chunks))

    def publish_new(self, name: str, data: bytes) -> bool:
        if self.exists(name) and not self._is_torn(name, data):
            return self.read_bytes(name) == data
        self._fs.pipe_file(self._path(name), data)
        self._fs.invalidate_cache()
        return self.read_bytes(name) == data  # of two that write at once the last one counts

    def add(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        self._fs.put_file(str(file), self._path(name))
        self._fs.invalidate_cache()
        if self.size(name) != size:
            raise OSError(f"{self.describe(name)}: {size} bytes sent, {self.size(name)} arrived")
        if self._tail(name, size) != _tail(file):
            raise OSError(f"{self.describe(name)}: not what was sent has arrived")

    def deliver(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        # A PUT whose answer was lost has been made: its file is ours if it ends as ours does.
        if not (self.exists(name) and self.size(name) == size and self._tail(name, size) == _tail(file)):
            if not self.has_part_of(file, name):
                self._require_absent(name)
            self.add(file, name)
        file.unlink()

    def has_part_of(self, file: Path, name: str) -> bool:
        """Whether the file ``name`` is there and holds the beginning of ``file``: an upload that broke off."""
        if not self.exists(name) or (size := self.size(name)) >= file.stat().st_size:
            return False
        with self.open(name) as there, file.open("rb") as here:
            while size > 0:
                chunk = there.read(min(CHUNK, size))
                if not chunk or chunk != here.read(len(chunk)):
                    return False
                size -= len(chunk)
        return True

    def _is_torn(self, name: str, data: bytes) -> bool:
        there = self.read_bytes(name)
        return len(there) < len(data) and data.startswith(there)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _tail(self, name: str, size: int) -> bytes:
        return bytes(self._fs.cat_file(self._path(name), start=max(0, size - TAIL), end=size))


def default_folder() -> Path:
    """Where downloaded files go: ``$XDG_CACHE_HOME/kdfast``, ``~/.cache/kdfast``, or a temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return local_path(base) / "kdfast" if base else Path.home() / ".cache" / "kdfast"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / f"kdfast-{os.getuid()}"


def digest(url: str) -> str:
    """A folder name that differs for each ``url``."""
    return blake2b(url.rstrip("/").encode(), digest_size=8).hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return file.read()
