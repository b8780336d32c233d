"""The shards of a cache directory, and ``manifest.json``, the list of them that a finished writer leaves.

A shard belongs to the cache by being there and valid, so the manifest adds nothing to what is read. It is there to
notice a shard that has gone missing, or been replaced by another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.storage import LocalStorage, Storage

__all__ = [
    "MANIFEST",
    "SHARD_NAME",
    "UNFINISHED",
    "check_listed",
    "entry_of",
    "load_shards",
    "no_shard",
    "read_manifest",
    "shard_names",
    "unfinished_names",
]

MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-([A-Za-z0-9_]+)-(\d{5,})\.safetensors")

UNFINISHED = (".part", ".journal")  # what a writer is at work on, or has left when it was killed

Entry = dict[str, str | int]


def load_shards(storage: Storage) -> list[Shard]:
    """Open the cache's shards, sorted by writer and number, and check them against each other and the manifest.

    Raises:
        CacheCorruptError: a shard is corrupt, missing or replaced, or the manifest cannot be read.
        CacheMismatchError: two shards are not of one cache.
        OSError: a file or the directory cannot be read.
    """
    listed = read_manifest(storage)  # before the directory: another writer may be adding to both
    shards = [Shard(storage.fetch(name)) for name in shard_names(storage)]
    for shard in shards[1:]:
        shard.meta.require_equal(shards[0].meta, str(shard.path), str(shards[0].path))
    found = {s.path.name: entry_of(s.path.name, s.records, s.rows, s.file_bytes, s.seal) for s in shards}
    check_listed(storage, listed, found)
    return shards


def shard_names(storage: Storage) -> list[str]:
    """The file names of all shards in ``storage``, sorted by writer and number."""
    matches = [match for name in storage.list() if (match := SHARD_NAME.fullmatch(name))]
    return [match[0] for match in sorted(matches, key=lambda match: (match[1], int(match[2])))]


def unfinished_names(storage: Storage) -> list[str]:
    """The names of the files that writers have not finished, sorted; none without a directory."""
    try:
        return [name for name in storage.list() if name.endswith(UNFINISHED)]
    except FileNotFoundError:
        return []


def no_shard(storage: Storage) -> CacheError:
    """The error for a cache without a shard, which says so if a writer has begun one."""
    left = unfinished_names(storage)
    if not left:
        return CacheError(f"{storage.url}: holds no shard of a kdfast cache")
    return CacheError(
        f"{storage.url}: holds no shard of a kdfast cache yet, only what writers have not finished "
        f"({', '.join(left[:4])}): start the writer again, and it resumes; or seal what there is with "
        "kdfast.cache.salvage(path)"
    )


def entry_of(name: str, records: int, rows: int, file_bytes: int, seal: str) -> Entry:
    """The manifest's entry for one shard."""
    return {"name": name, "records": records, "rows": rows, "bytes": file_bytes, "seal": seal}


def read_manifest(storage: Storage, *, torn: bool = False) -> dict[str, Any]:
    """The manifest's entries by shard name; none without a manifest. Raises ``CacheCorruptError`` if it is broken.

    Args:
        torn: whether one whose upload broke off counts as none, for a writer that will write it again.
    """
    try:
        data = storage.read_bytes(MANIFEST)
    except FileNotFoundError:
        return {}
    if torn and not isinstance(storage, LocalStorage) and not data.rstrip().endswith(b"}"):
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(data)["shards"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        where = storage.describe(MANIFEST)
        raise CacheCorruptError(f"{where}: cannot be read ({error!r}); without it the shards still open") from error


def check_listed(storage: Storage, listed: Mapping[str, Any], found: Mapping[str, Entry]) -> None:
    """Raise ``CacheCorruptError`` unless every shard that is listed is there, and the one that was listed."""
    for name, entry in listed.items():
        if name not in found:
            raise CacheCorruptError(f"{storage.describe(str(name))}: is listed in {MANIFEST} but not there")
        if entry != found[name]:
            raise CacheCorruptError(f"{storage.describe(name)}: is not the file that {MANIFEST} lists")
