"""From keys to record numbers, counted over all shards of a cache; and the numbers that have been looked up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdfast._record_keys import InputsKey
from kdfast.cache.errors import CacheCorruptError
from kdfast.cache.format.keys import DIGEST_BYTES, Key, make_key, make_keys
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.sorted_keys import SortedKeys, keys_of

__all__ = ["HashLookup", "Lookup", "RangeLookup", "RecordIndex"]


@dataclass(frozen=True, eq=False, repr=False)
class RecordIndex:
    """Where a cache holds the records, or the spans, of some keys. ``CacheReader.index`` makes it, ``gather`` takes it.

    Index it by position: an int, a slice, a bool mask, or positions. The result is a ``RecordIndex`` too. It takes
    8 bytes per record, or 24 if spans are among them, and pickles. It serves every reader that has opened the same
    shards, and no other.
    """

    records: NDArray[np.int64]  # numbered over all shards; -1: absent rows
    shards: bytes  # the fingerprint of the shards whose records are numbered here
    spans: NDArray[np.int64] | None = None  # (n, 2): first row and number of rows; None: whole records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, positions: int | slice | Sequence[int] | NDArray[Any] | Tensor) -> RecordIndex:
        if isinstance(positions, Tensor):
            positions = positions.cpu().numpy()
        elif not isinstance(positions, slice):
            positions = np.asarray(positions)
            positions = positions if positions.size else positions.astype(np.int64)  # [] is of floats to numpy
        spans = None if self.spans is None else self.spans[positions].reshape(-1, 2)
        return RecordIndex(np.atleast_1d(self.records[positions]), self.shards, spans)

    def __repr__(self) -> str:
        return f"RecordIndex(records={len(self)})"


class Lookup(Protocol):
    """Finds records by their keys. Of records with equal keys it finds the first."""

    records: int  # that can be found
    duplicates: int  # that cannot: another one has their key
    note: str  # where it looks, for people

    def find(self, keys: Any) -> NDArray[np.int64]:
        """(n,) the record number of each key; -1 where there is none."""

    def hint(self, key: Any) -> str:
        """Why ``key`` may not have been found, to end a message; empty if that is not known."""

    def __iter__(self) -> Iterator[Key | int]:
        """Iterate over the keys that can be found, in the order of their records."""


class HashLookup:
    """Finds keys by their digests: binary search in sorted prefixes, then comparison with the shard's own table."""

    def __init__(self, shards: Sequence[Shard], starts: NDArray[np.int64], keys: SortedKeys, note: str) -> None:
        self._shards, self._starts, self._sorted, self.note = shards, starts, keys, note
        self.records, self.duplicates = len(keys.records), len(keys.duplicates)

    def find(self, keys: Any) -> NDArray[np.int64]:
        if not (isinstance(keys, (Tensor, np.ndarray)) and keys.ndim == 2):
            keys = [_plain(key) for key in keys]
        wanted = np.frombuffer(b"".join(make_keys(keys)), np.uint8).reshape(-1, DIGEST_BYTES)
        found = np.full(len(wanted), -1)
        prefixes, records = self._sorted.prefixes, self._sorted.records
        first = wanted.view("<u8")[:, 0]
        at = np.searchsorted(prefixes, first)
        left = np.arange(len(wanted))  # keys whose record may still be ahead
        while len(left):
            left = left[at[left] < len(prefixes)]
            left = left[prefixes[at[left]] == first[left]]
            candidates = records[at[left]]
            if len(candidates) and not 0 <= int(candidates.min()) <= int(candidates.max()) < self._starts[-1]:
                raise CacheCorruptError(f"{self.note}: names records that the cache does not have")
            same = (keys_of(self._shards, self._starts, candidates) == wanted[left]).all(1)
            found[left[same]] = candidates[same]
            left = left[~same]
            at[left] += 1  # other keys have this prefix too
        return found

    def hint(self, key: Any) -> str:
        if isinstance(key, InputsKey) and key.ids is not None and self._has(key.ids):
            return (
                ": the cache has a record of these ids alone, without all else that the model is given. If that is "
                "meant, give key=(lambda batch: ...) that returns each row of ids"
            )
        if not isinstance(key, Integral) and isinstance(_plain(key), Integral):
            return ": each number of a tensor is a key. The ids of one record are a list of one key, [ids]"
        if not isinstance(key, (Tensor, np.ndarray, list)) or len(key) < 2:
            return ""
        ids = np.asarray(key.cpu() if isinstance(key, Tensor) else key)
        for side, row in (("last", ids), ("first", ids[::-1])):
            run = int(np.argmax(np.append(row[::-1] != row[-1], True)))
            for count in range(run, 0, -1):  # a text may end with the id that pads it
                kept = row[: len(row) - count]
                if len(kept) and self._has(kept if side == "last" else kept[::-1]):
                    return f": it is without its {count} {side} ids, all {row[-1]}. Keys are ids[attention_mask.bool()]"
        return ""

    def _has(self, key: Any) -> bool:
        return bool(self.find([key])[0] >= 0)

    def __iter__(self) -> Iterator[Key]:
        hidden = set(self._sorted.duplicates.tolist())
        for start, shard in zip(self._starts.tolist(), self._shards, strict=False):
            for number in range(shard.records):
                if start + number not in hidden:
                    yield Key(shard.keys[number].tobytes())


class RangeLookup:
    """Finds integer keys that are consecutive within each shard, by arithmetic."""

    note = "none: keys are consecutive integers"

    def __init__(self, shards: Sequence[Shard], starts: NDArray[np.int64]) -> None:
        first = np.array([shard.first_record for shard in shards])
        end = first + np.diff(starts)
        # Keys from points[i - 1] to points[i] - 1 are those of shard owner[i], -1 being none.
        self._points = np.unique(np.concatenate([first, end]))
        self._owner = np.full(len(self._points) + 1, -1)
        for number in reversed(range(len(shards))):  # the first shard's are set last, and stay
            low, high = np.searchsorted(self._points, [first[number], end[number]]).tolist()
            self._owner[low + 1 : high + 1] = number
        self._shift = starts[:-1] - first  # from keys to records
        self.records = int(np.diff(self._points)[self._owner[1:-1] >= 0].sum())
        self.duplicates = int(starts[-1]) - self.records

    def find(self, keys: Any) -> NDArray[np.int64]:
        numbers = _integers(keys)
        owner = self._owner[np.searchsorted(self._points, numbers, side="right")]
        return np.where(owner >= 0, numbers + self._shift[owner], -1)

    def hint(self, key: Any) -> str:
        return "" if isinstance(_plain(key), Integral) else ": its keys are consecutive integers"

    def __iter__(self) -> Iterator[int]:
        for number in range(len(self._shift)):
            for at in np.flatnonzero(self._owner == number).tolist():
                yield from range(int(self._points[at - 1]), int(self._points[at]))


def _plain(key: Any) -> Any:
    """``key`` as ``make_key`` takes it: the number in a tensor without dimensions, and a list of ints as ids."""
    if isinstance(key, (Tensor, np.ndarray)) and key.ndim == 0:
        value = key.item()
        return key if isinstance(value, (bool, float)) else value
    ids = isinstance(key, list) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in key)
    return np.array(key, np.int64) if ids else key


def _integers(keys: Any) -> NDArray[np.int64]:
    """``keys`` as int64; -1, which no record has, for anything that is no integer in range."""
    if isinstance(keys, Tensor):
        keys = keys.detach().cpu().numpy()
    if isinstance(keys, range):
        return np.arange(keys.start, keys.stop, keys.step)
    if isinstance(keys, np.ndarray) and keys.ndim == 1 and keys.dtype.kind in "iu":
        return keys.astype(np.int64)
    return np.array([_integer(key) for key in keys], np.int64)


def _integer(key: Any) -> int:
    key = _plain(key)
    if isinstance(key, Integral) and not isinstance(key, bool):
        return int(key) if 0 <= int(key) < 2**63 else -1
    make_key(key)  # raises what it is not
    return -1
