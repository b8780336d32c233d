"""The shards of a cache directory, and ``manifest.json``, the list of them that a finished writer leaves.

A shard belongs to the cache by being there and valid, so the manifest adds nothing to what is read. It is there to
notice a shard that has gone missing, or been replaced by another one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kdfast.cache.errors import CacheCorruptError
from kdfast.cache.meta import FORMAT, FORMAT_VERSION
from kdfast.cache.publish import publish
from kdfast.cache.shard import Shard

__all__ = ["SHARD_NAME", "load_shards", "write_manifest"]

MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-([A-Za-z0-9_]+)-(\d{5,})\.safetensors")


def load_shards(directory: Path) -> list[Shard]:
    """The directory's shards by writer and number, checked against each other and the manifest, if there is one.

    Raises:
        CacheCorruptError: a shard is corrupt, missing or replaced, or the manifest cannot be read.
        CacheMismatchError: two shards are not of one cache.
        OSError: a file or the directory cannot be read.
    """
    listed = _read_manifest(directory / MANIFEST)  # before the directory: another writer may be adding to both
    names = sorted((m[1], int(m[2]), m[0]) for p in directory.iterdir() if (m := SHARD_NAME.fullmatch(p.name)))
    shards = [Shard(directory / name) for *_, name in names]
    for shard in shards[1:]:
        shard.meta.require_equal(shards[0].meta, str(shard.path), str(shards[0].path))
    _check_listed(directory, listed, shards)
    return shards


def write_manifest(directory: Path) -> None:
    """List the shards that are there now, other writers' included."""
    entries = [_entry(shard) for shard in load_shards(directory)]
    document = {"format": FORMAT, "version": FORMAT_VERSION, "shards": entries}
    publish(directory / MANIFEST, [json.dumps(document, indent=1).encode()])


def _entry(shard: Shard) -> dict[str, str | int]:
    return {
        "name": shard.path.name,
        "records": len(shard.keys),
        "rows": shard.rows,
        "bytes": shard.file_bytes,
        "seal": shard.seal,
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    """Its entries by shard name; none if there is no manifest."""
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_bytes())["shards"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheCorruptError(f"{path}: cannot be read ({error!r}); without it the shards still open") from error


def _check_listed(directory: Path, listed: dict[str, Any], shards: list[Shard]) -> None:
    found = {shard.path.name: shard for shard in shards}
    for name, entry in listed.items():
        if name not in found:
            raise CacheCorruptError(f"{directory / str(name)}: is listed in {MANIFEST} but not there")
        if entry != _entry(found[name]):
            raise CacheCorruptError(f"{directory / name}: is not the file that {MANIFEST} lists")
