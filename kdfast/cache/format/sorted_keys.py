"""``index.safetensors``: the keys of all shards, sorted. It is derived from them, and saves a reader the sorting.

It is safetensors, sealed like a shard, with these tensors:

| name | dtype, shape | holds |
|---|---|---|
| ``prefixes`` | U64 (N,) | the first 8 bytes of every key, as a little-endian number, in ascending order |
| ``records`` | I64 (N,) | the record of each, numbered over all shards; equal prefixes by record |
| ``duplicates`` | I64 (D,) | records whose key an earlier one has, in ascending order: they are not among the N |
| ``seal`` | U32 (2,) | the CRC of the first 8 + H bytes of the file, and that of everything between them and the seal |

and this metadata: ``format`` is ``kdfast-cache-index``, ``version`` is ``1``, and ``shards`` the concatenated seals of
the shards, in order, in hexadecimal. An index of other shards than those that are there is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kdfast._C import copy_ranges
from kdfast.cache.errors import CacheCorruptError
from kdfast.cache.format.container import Container, Layout, pack_sealed, read_container
from kdfast.cache.format.keys import DIGEST_BYTES
from kdfast.cache.format.storage import Storage

__all__ = ["INDEX", "KeyTable", "SortedKeys", "keys_of", "read_index", "sort_keys", "verify_index", "write_index"]

INDEX = "index.safetensors"
LAYOUT: Layout = {
    "prefixes": ("U64", ()),
    "records": ("I64", ()),
    "duplicates": ("I64", ()),
    "seal": ("U32", ()),
}
LOOKED_AT = 64  # keys that are compared with the shards' whenever an index is opened
FORMAT = {"format": "kdfast-cache-index", "version": "1"}


class KeyTable(Protocol):
    """A shard, as far as sorting its keys needs it."""

    keys: NDArray[np.uint8]  # (records, 16)

    @property
    def seal(self) -> str: ...


class SortedKeys(NamedTuple):
    """The tables of ``index.safetensors``; the module's docstring describes them."""

    prefixes: NDArray[np.uint64]
    records: NDArray[np.int64]
    duplicates: NDArray[np.int64]


def sort_keys(shards: Sequence[KeyTable]) -> SortedKeys:
    """The index of ``shards``, in memory: 16 bytes per record, and twice as much again while it is made."""
    prefixes = np.concatenate([shard.keys.view("<u8")[:, 0] for shard in shards])
    order = np.argsort(prefixes, kind="stable")
    prefixes = prefixes[order]
    same = np.flatnonzero(prefixes[1:] == prefixes[:-1])
    tied = np.union1d(same, same + 1)  # places whose prefix occurs more than once
    starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
    _, first = np.unique(keys_of(shards, starts, order[tied]).view(f"S{DIGEST_BYTES}"), return_index=True)
    later = np.delete(tied, first)
    return SortedKeys(np.delete(prefixes, later), np.delete(order, later), np.sort(order[later]))


def keys_of(shards: Sequence[KeyTable], starts: NDArray[np.int64], records: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(n, 16) uint8: the stored keys of ``records``. ``starts`` are the record numbers at which shards begin."""
    owners, buffers = np.unique(np.searchsorted(starts, records, side="right") - 1, return_inverse=True)
    begin = (records - starts[owners][buffers]) * DIGEST_BYTES
    ranges = np.stack([begin, np.full_like(begin, DIGEST_BYTES)], 1)
    tables = [shards[owner].keys.reshape(-1) for owner in owners.tolist()]
    keys: NDArray[np.uint8] = copy_ranges(tables, buffers, ranges).reshape(-1, DIGEST_BYTES)
    return keys


def write_index(storage: Storage, shards: Sequence[KeyTable]) -> None:
    """Write the index of ``shards``, which are all that ``storage`` holds, in order. Raises ``OSError``.

    Where keys are consecutive integers there is nothing to be sorted, and no file.
    """
    if any(len(shard.keys) for shard in shards):
        tables = sort_keys(shards)._asdict()
        storage.publish(INDEX, pack_sealed({**FORMAT, "shards": _seals(shards)}, tables, LAYOUT))


def read_index(path: Path, shards: Sequence[KeyTable]) -> tuple[SortedKeys | None, str]:
    """The index at ``path``, mapped, and a note on it. None if it is not that of ``shards``, the note saying why."""
    try:
        container = read_container(path, LAYOUT)
    except FileNotFoundError:
        return None, f"there is no {INDEX}"
    except CacheCorruptError as error:
        return None, str(error)
    if not _is_of(container, shards):
        return None, f"{INDEX} was made for other shards"
    keys = _tables(container)
    records = sum(len(shard.keys) for shard in shards)
    if len(keys.prefixes) != len(keys.records) or len(keys.records) + len(keys.duplicates) != records:
        return None, f"{path}: its tables differ in length"
    # All of it is not compared with the shards' keys before ``verify``: an open takes no longer for a larger cache.
    some = np.unique(np.linspace(0, len(keys.records) - 1, min(len(keys.records), LOOKED_AT)).astype(np.int64))
    if not _agree(keys.prefixes[some], keys.records[some], shards, records):
        return None, f"{path}: names other keys than those of the shards"
    return keys, INDEX


def verify_index(path: Path, shards: Sequence[KeyTable]) -> None:
    """Compare the index at ``path``, if there is one, with the keys of ``shards``.

    Raises:
        CacheCorruptError: it is not what was written, or is made for these shards and is not theirs.
    """
    try:
        container = read_container(path, LAYOUT)
    except FileNotFoundError:
        return
    if not _is_of(container, shards):
        return  # which says so itself, and is not used
    pairs = zip(_tables(container), sort_keys(shards), strict=True)
    if not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
        raise CacheCorruptError(f"{path}: is not the index of the shards that it says it is made for")


def _is_of(container: Container, shards: Sequence[KeyTable]) -> bool:
    expected = {**FORMAT, "shards": _seals(shards)}
    return all(container.metadata.get(name) == value for name, value in expected.items())


def _tables(container: Container) -> SortedKeys:
    return SortedKeys(**{name: container.tables[name] for name in SortedKeys._fields})


def _agree(prefixes: NDArray[np.uint64], records: NDArray[np.int64], shards: Sequence[KeyTable], total: int) -> bool:
    """Whether each of ``records`` is one of ``total``, and has a key with the prefix that the index says."""
    if len(records) and not 0 <= int(records.min()) <= int(records.max()) < total:
        return False
    starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
    return bool((keys_of(shards, starts, records).view("<u8")[:, 0] == prefixes).all())


def _seals(shards: Sequence[KeyTable]) -> str:
    return "".join(shard.seal for shard in shards)
