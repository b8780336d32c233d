"""Walking a cache from end to end: every record once, in order, in batches of bounded size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kdfast.cache.format.keys import Key
from kdfast.cache.format.manifest import load_shards
from kdfast.cache.format.meta import RANGE
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.storage import open_storage
from kdfast.cache.read.reader import CacheReader
from kdfast.labels import SoftLabels

__all__ = ["RecordBatch", "walk"]

BATCH_VALUES = 2**20  # of one batch, unless a single record holds more


@dataclass(frozen=True)
class RecordBatch:
    """Some records: their keys, the number of rows of each, and their labels, concatenated."""

    keys: list[Key | int]
    rows: list[int]
    labels: SoftLabels

    def records(self) -> Iterator[tuple[Key | int, SoftLabels]]:
        """Yield the key and the labels of each record."""
        start = 0
        for key, rows in zip(self.keys, self.rows, strict=True):
            yield key, self.labels[start : start + rows]
            start += rows


def walk(path: str | os.PathLike[str], cache: CacheReader) -> Iterator[RecordBatch]:
    """Yield the records of ``cache``, which lies at ``path``, without duplicates; integer keys in ascending order."""
    per_row = 0  # values of a row; 0: not known before a record with rows has been read, by itself
    keys: list[Key | int] = []
    rows: list[int] = []
    total = 0
    for key, count in _records(path):
        if keys and (not per_row or (total + count) * per_row > BATCH_VALUES):
            batch = RecordBatch(keys, rows, cache.gather(keys))
            if len(batch.labels):
                per_row = max(1, batch.labels.values.numel() // len(batch.labels))
            yield batch
            keys, rows, total = [], [], 0
        keys.append(key)
        rows.append(count)
        total += count
    if keys:
        yield RecordBatch(keys, rows, cache.gather(keys))


def _records(path: str | os.PathLike[str]) -> Iterator[tuple[Key | int, int]]:
    """Yield key and number of rows of each record; of equal keys only the first."""
    seen: set[Key | int] = set()
    shards = [(at, shard) for at, shard in enumerate(load_shards(open_storage(path)))]
    for _, shard in sorted(shards, key=lambda pair: (pair[1].first_record, pair[0])):
        spans = shard.spans(np.arange(shard.records))
        for number, rows in enumerate(spans[:, 1].tolist()):
            key = _key(shard, number)
            if key not in seen:
                seen.add(key)
                yield key, rows


def _key(shard: Shard, number: int) -> Key | int:
    return shard.first_record + number if shard.meta.keys == RANGE else Key(shard.keys[number].tobytes())
