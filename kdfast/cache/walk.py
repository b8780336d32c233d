"""Every record of a cache once, in order, in portions of bounded size: for what reads a cache from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from kdfast.cache.keys import Key
from kdfast.cache.manifest import SHARD_NAME
from kdfast.cache.reader import CacheReader
from kdfast.labels import SoftLabels

__all__ = ["Portion", "shard_files", "walk"]

PORTION_VALUES = 2**20  # of one portion, unless a single record holds more


@dataclass(frozen=True)
class Portion:
    """Some records: their keys, the rows of each, and the labels of all, one after another."""

    keys: list[Key]
    rows: list[int]
    labels: SoftLabels

    def records(self) -> Iterator[tuple[Key, SoftLabels]]:
        """Each record by itself."""
        start = 0
        for key, rows in zip(self.keys, self.rows, strict=True):
            yield key, self.labels[start : start + rows]
            start += rows


def shard_files(directory: Path) -> list[Path]:
    """The shards of ``directory`` in the order in which their records count: by writer as text, then by number."""
    named = [
        (match[1], int(match[2]), path) for path in directory.iterdir() if (match := SHARD_NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(named)]


def walk(directory: Path, cache: CacheReader) -> Iterator[Portion]:
    """The records of ``cache``, which ``directory`` holds, duplicates left out."""
    per_row = 1
    keys: list[Key] = []
    rows: list[int] = []
    for key, count in _records(directory):
        if keys and (sum(rows) + count) * per_row > PORTION_VALUES:
            portion = Portion(keys, rows, cache.gather(keys))
            per_row = max(1, portion.labels.values.numel() // max(1, len(portion.labels)))
            yield portion
            keys, rows = [], []
        keys.append(key)
        rows.append(count)
    if keys:
        yield Portion(keys, rows, cache.gather(keys))


def _records(directory: Path) -> Iterator[tuple[Key, int]]:
    """Key and rows of each record, the first of equal keys alone."""
    seen: set[Key] = set()
    for path in shard_files(directory):
        with safe_open(path, "np") as shard:
            keys, spans = shard.get_tensor("record_keys"), shard.get_tensor("record_spans")
        for key, rows in zip(map(Key, map(bytes, keys)), spans[:, 1].tolist(), strict=True):
            if key not in seen:
                seen.add(key)
                yield key, rows
