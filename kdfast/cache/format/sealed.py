"""The shards a cache has, as a writer needs to know them: everything but their payloads."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.container import MAX_HEADER, Container, read_container
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.format.keys import number_keys
from kdfast.cache.format.manifest import MANIFEST, SHARD_NAME, check_listed, entry_of, read_manifest, shard_names
from kdfast.cache.format.meta import FORMAT, FORMAT_VERSION, HASH, RANGE, CacheMeta
from kdfast.cache.format.shard import Outline
from kdfast.cache.format.sorted_keys import write_index
from kdfast.cache.format.storage import LocalStorage, Storage

__all__ = ["Sealed", "scan", "write_manifest"]

FREE_RECORDS, RECORDS_PER_BYTE = 2**20, 64  # a number key is made for each


class Sealed:
    """The tables of one sealed shard, as a writer needs them.

    Raises:
        CacheCorruptError: the file is not what was written.
        CacheError: it is, but of another format version.
        OSError: it cannot be read.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        with _outline(storage, name) as path:
            try:
                container = read_container(path)
                self.meta = CacheMeta.from_strings(container.metadata)
                outline = Outline.of(container)
                _require_room(outline, container)
                self.rows = int(container.tables["block_index"][:, 3].sum())
                self.floor = FloorSums.from_metadata(container.metadata, self.rows)
            except CacheError as error:
                message = str(error).removeprefix(f"{path}: ")
                raise type(error)(f"{storage.describe(name)}: {message}") from error
            except ValueError as error:
                raise CacheCorruptError(f"{storage.describe(name)}: {error}") from error
        tables = container.tables
        self.keys: NDArray[np.uint8] = tables["record_keys"]
        if self.meta.keys == RANGE:
            self.keys = number_keys(outline.first_record, outline.records)
        self.targets: NDArray[np.uint32] | None = tables.get("record_targets")
        self.model = tables["codec_model"].tobytes() if "codec_model" in tables else b""
        self.seal = container.seal.hex()
        self.file_bytes = container.file_bytes
        match = SHARD_NAME.fullmatch(name)
        if match is None:
            raise CacheError(f"{storage.describe(name)}: is not a shard's name")
        self.writer, self.number = match[1], int(match[2])


def scan(storage: Storage, torn: Callable[[str], bool] = lambda name: False) -> list[Sealed]:
    """Read the tables of all shards, by writer and number, and check them against each other and the manifest.

    Args:
        torn: whether a shard that is corrupt will be delivered once more: it is left out.

    Raises:
        CacheCorruptError: a shard is corrupt, missing or replaced, or the manifest cannot be read.
        CacheMismatchError: two shards are not of one cache.
        OSError: a file or the directory cannot be read.
    """
    listed = read_manifest(storage, torn=True)  # before the directory: another writer may be adding to both
    shards = []
    for name in shard_names(storage):
        try:
            shards.append(Sealed(storage, name))
        except CacheCorruptError:
            if not torn(name):
                raise
    for shard in shards[1:]:
        shard.meta.require_equal(shards[0].meta, storage.describe(shard.name), storage.describe(shards[0].name))
    check_listed(storage, listed, {shard.name: _entry(shard) for shard in shards})
    return shards


def write_manifest(storage: Storage) -> None:
    """List the shards that are there now, other writers' included, and sort their keys for readers."""
    names: list[str] = []
    # Of two that write at the same time the last one would win, and it may have looked first: so look again.
    while shard_names(storage) != names:
        shards = scan(storage)
        entries = [_entry(shard) for shard in shards]
        names = [str(entry["name"]) for entry in entries]
        document = {"format": FORMAT, "version": FORMAT_VERSION, "shards": entries, **_floor(shards)}
        storage.publish(MANIFEST, [json.dumps(document, indent=1).encode()])
        if shards and shards[0].meta.keys == HASH:
            write_index(storage, shards)


def _entry(shard: Sealed) -> dict[str, str | int]:
    return entry_of(shard.name, len(shard.keys), shard.rows, shard.file_bytes, shard.seal)


def _floor(shards: list[Sealed]) -> dict[str, Any]:
    """What the manifest says of how far the labels lie from the teacher's rows; nothing where it is not known."""
    sums = FloorSums.total(shard.floor for shard in shards)
    if sums is None:
        return {}
    floor = sums.floor(shards[0].meta.temperatures[0])._asdict()
    return {"floor": {**floor, "kl": floor["kl"] if isfinite(floor["kl"]) else None}}


def _require_room(outline: Outline, container: Container) -> None:
    """Raise ``ValueError`` for more records than keys, or than any codec can store in the payload that there is."""
    keys = len(container.tables["record_keys"])
    most = FREE_RECORDS + RECORDS_PER_BYTE * (container.payload_bytes + container.file_bytes)
    if not 0 <= outline.records <= most or (keys and keys != outline.records):
        raise ValueError(f"its {container.file_bytes} bytes cannot hold {outline.records} records")


@contextmanager
def _outline(storage: Storage, name: str) -> Iterator[Path]:
    """A local copy of a shard. Of a remote one only the ends are fetched; its payload, which is not read, is a hole."""
    if isinstance(storage, LocalStorage):
        yield storage.fetch(name)
        return
    with tempfile.TemporaryDirectory(prefix="kdfast-") as folder:
        path = Path(folder) / name
        with storage.open(name) as source, path.open("wb") as copy:
            _copy_ends(source, copy, storage.size(name))
        yield path


def _copy_ends(source: BinaryIO, copy: BinaryIO, size: int) -> None:
    """Copy header and tables to their places in a file of ``size`` bytes. Nothing is checked here."""
    prefix = source.read(8)
    length = int.from_bytes(prefix, "little")
    header = source.read(length if length <= min(size, MAX_HEADER) else 0)
    copy.write(prefix + header)
    try:
        payload = int(json.loads(header)["payload"]["data_offsets"][1])
    except (ArithmeticError, ValueError, LookupError, TypeError, RecursionError):
        payload = 0
    tables = min(size, 8 + length + max(0, payload))
    source.seek(tables)
    copy.seek(tables)
    copy.write(source.read())
    os.ftruncate(copy.fileno(), size)
