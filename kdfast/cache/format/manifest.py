"""The shards of a cache directory, and ``manifest.json``, the list of them that a finished writer leaves.

A shard belongs to the cache by being there and valid, so the manifest adds nothing to what is read. It is there to
notice a shard that has gone missing, or been replaced by another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.meta import FORMAT, FORMAT_VERSION
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.storage import LocalStorage, Storage
from kdfast.cache.format.strict import parse_json

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
SHARD_NAME = re.compile(r"shard-([A-Za-z0-9_]+)-([0-9]{5}|[1-9][0-9]{5,17})\.safetensors")
SEAL = re.compile("[0-9a-f]{16}")

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
    """The manifest's entries by shard name; none without a manifest.

    Args:
        torn: whether one whose upload broke off counts as none, for a writer that will write it again.

    Raises:
        CacheCorruptError: it is none that a writer makes; the message says what is wrong.
        CacheError: it is of another format version.
    """
    where = storage.describe(MANIFEST)
    try:
        data = storage.read_bytes(MANIFEST)
    except FileNotFoundError:
        return {}
    if torn and not isinstance(storage, LocalStorage) and not data.rstrip().endswith(b"}"):
        return {}
    try:
        entries = _entries(parse_json(data), where)
    except CacheError:
        raise
    except ValueError as error:
        raise CacheCorruptError(f"{where}: cannot be read ({error}); without it the shards still open") from error
    return {entry["name"]: entry for entry in entries}


def _entries(document: Any, where: str) -> list[dict[str, Any]]:
    """The shards that a manifest lists. Raises ``CacheError`` for another version, ``ValueError`` for no manifest."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"it does not say that its format is {FORMAT}")
    version = document.get("version")
    if type(version) is not int:
        raise ValueError("it has no version")
    if version != FORMAT_VERSION:
        raise CacheError(f"{where}: has format version {version}, this kdfast reads {FORMAT_VERSION}")
    entries = document.get("shards")
    if not isinstance(entries, list):
        raise ValueError("it has no list of shards")
    for number, entry in enumerate(entries):
        if not _is_entry(entry):
            raise ValueError(f"its entry {number} is not one of a shard")
    if len({entry["name"] for entry in entries}) < len(entries):
        raise ValueError("it lists a shard twice")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"name", "records", "rows", "bytes", "seal"}:
        return False
    texts = {"name": SHARD_NAME, "seal": SEAL}
    return all(isinstance(entry[name], str) and form.fullmatch(entry[name]) for name, form in texts.items()) and all(
        type(entry[name]) is int and 0 <= entry[name] < 2**63 for name in ("records", "rows", "bytes")
    )


def check_listed(storage: Storage, listed: Mapping[str, Any], found: Mapping[str, Entry]) -> None:
    """Raise ``CacheCorruptError`` unless every shard that is listed is there, and the one that was listed."""
    for name, entry in listed.items():
        if name not in found:
            raise CacheCorruptError(f"{storage.describe(str(name))}: is listed in {MANIFEST} but not there")
        if entry != found[name]:
            raise CacheCorruptError(f"{storage.describe(name)}: is not the file that {MANIFEST} lists")
