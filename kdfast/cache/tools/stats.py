"""Statistics of a cache: what its bytes are for, and how its rows are distributed. Every row is read once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.codecs.learned_table import CHOSEN
from kdfast.cache.format.container import read_container
from kdfast.cache.format.declared import DECLARATION
from kdfast.cache.format.manifest import MANIFEST, UNFINISHED, shard_names
from kdfast.cache.format.sorted_keys import INDEX
from kdfast.cache.format.storage import Storage, open_storage
from kdfast.cache.read.reader import CacheInfo, open_cache
from kdfast.cache.read.walk import walk
from kdfast.labels import Ragged, SoftLabels
from kdfast.labels.ragged import Tailed

__all__ = ["MASS_BINS", "CacheBytes", "CacheStats", "cache_stats"]

# Of the histogram of tail mass: ten to a decade, one below, and the last ends at 1.
MASS_BINS = np.concatenate([[0.0], np.logspace(-6, 0, 61)])


@dataclass
class CacheBytes:
    """The files of a cache, in bytes."""

    payload: int = 0  # the labels themselves
    model: int = 0  # codec models, within the shards
    tables: int = 0  # the rest of the shards: headers, indices, keys, checksums
    assets: int = 0  # what the codec reads beside the shards
    indices: int = 0  # the manifest, the sorted keys and the declaration, which can be made again

    @property
    def files(self) -> int:
        """The sum of all."""
        return self.payload + self.model + self.tables + self.assets + self.indices


@dataclass
class CacheStats:
    """Distributions over the rows of a cache, duplicates left out; bytes count everything that is stored.

    ``entries[n]`` rows have n entries (none are counted for dense labels, whose rows have every column).
    ``tail_mass[t]`` counts the rows by the probability outside their entries at the t-th temperature, in ``MASS_BINS``.
    ``block_bytes`` are the bytes per row of each block.
    """

    info: CacheInfo
    bytes: CacheBytes
    block_bytes: NDArray[np.float64]
    kind: str = ""
    rows: int = 0
    entries: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    tail_mass: NDArray[np.int64] | None = None  # (temperatures, bins); None: the labels have no tail
    mean_tail_mass: NDArray[np.float64] | None = None  # (temperatures,)

    @property
    def entries_per_row(self) -> float:
        """The mean number of entries of a row."""
        return float(np.arange(len(self.entries)) @ self.entries) / max(self.rows, 1)

    def tail_quantile(self, share: float, temperature: int = 0) -> float:
        """The tail mass that a ``share`` of the rows do not exceed, rounded up to the end of its bin."""
        assert self.tail_mass is not None
        counts = self.tail_mass[temperature].cumsum()
        return float(MASS_BINS[1 + np.searchsorted(counts, share * counts[-1])]) if counts[-1] else 0.0


def cache_stats(path: str | os.PathLike[str], *, progress: Callable[[int], None] | None = None) -> CacheStats:
    """Read a cache from end to end, and count its bytes, entries and tail masses.

    Args:
        path: a directory or URL.
        progress: called with the number of records read since it was called last.

    Raises:
        CacheCorruptError: a shard is corrupt; the message names it.
        CacheError: there is no shard.
    """
    cache = open_cache(path)
    stats = CacheStats(cache.info, *_layout(open_storage(path)))
    for batch in walk(path, cache):
        _count(stats, batch.labels)
        if progress is not None:
            progress(len(batch.keys))
    if stats.mean_tail_mass is not None:
        stats.mean_tail_mass /= max(stats.rows, 1)
    return stats


def _layout(storage: Storage) -> tuple[CacheBytes, NDArray[np.float64]]:
    """The cache's bytes by what they are for, and the bytes per row of each block."""
    total = CacheBytes()
    blocks = [np.zeros(0)]
    shards = shard_names(storage)
    for name in shards:
        tables = read_container(storage.fetch(name)).tables
        index = tables["block_index"]
        model = len(tables["codec_model"]) if "codec_model" in tables else 0
        payload = int(index[:, 1].sum())
        blocks.append(index[:, 1] / index[:, 3])
        total.payload += payload
        total.model += model
        total.tables += storage.size(name) - payload - model
    for name in storage.list():
        if name in (MANIFEST, INDEX, DECLARATION, CHOSEN):
            total.indices += storage.size(name)
        elif name not in shards and not name.endswith(UNFINISHED):
            total.assets += storage.size(name)
    return total, np.concatenate(blocks)


def _count(stats: CacheStats, labels: SoftLabels) -> None:
    stats.kind = labels.kind
    stats.rows += len(labels)
    if isinstance(labels, Ragged):
        counts = np.bincount(labels.counts.numpy(), minlength=len(stats.entries))
        counts[: len(stats.entries)] += stats.entries
        stats.entries = counts
    if not isinstance(labels, Tailed):
        return
    mass = labels.tails.double().exp().clamp(max=1.0).numpy()
    if stats.tail_mass is None or stats.mean_tail_mass is None:
        stats.tail_mass = np.zeros((len(mass), len(MASS_BINS) - 1), np.int64)
        stats.mean_tail_mass = np.zeros(len(mass))
    stats.tail_mass += np.stack([np.histogram(row, MASS_BINS)[0] for row in mass])
    stats.mean_tail_mass += mass.sum(1)
