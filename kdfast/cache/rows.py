"""Rows from several shards and blocks at once, in any order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.cache.codecs.base import Codec, FixedWidthCodec
from kdfast.cache.shard import Shard
from kdfast.labels import SoftLabels

__all__ = ["Rows"]


class Rows:
    """The rows of some shards, numbered over all of them.

    Raises:
        CacheCorruptError: a shard's blocks do not have the lengths that ``codec`` gives them.
    """

    def __init__(self, shards: list[Shard], codec: Codec) -> None:
        self._shards, self._codec = shards, codec
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        if isinstance(codec, FixedWidthCodec):
            for shard in shards:
                shard.require_width(codec)

    def labels(self, rows: NDArray[np.int64]) -> SoftLabels:
        """The labels of ``rows``, in that order. Raises ``CacheCorruptError`` naming shard and block."""
        if not len(rows):
            return self._codec.decode(np.empty(0, np.uint8), np.empty((0, 3), np.int64), rows)
        if isinstance(self._codec, FixedWidthCodec):
            packed = self._packed(rows, self._codec.row_bytes).view(self._codec.row_dtype)
            try:
                return self._codec.unpack(packed)
            except ValueError:
                pass  # decoding block by block tells in which one the bad row is
        return self._by_block(rows)

    def _packed(self, rows: NDArray[np.int64], row_bytes: int) -> NDArray[np.void]:
        if len(self._shards) == 1:
            return self._shards[0].packed(rows, row_bytes)
        packed = np.empty(len(rows), f"V{row_bytes}")
        for shard, positions, local in self._by_shard(rows):
            packed[positions] = shard.packed(local, row_bytes)
        return packed

    def _by_block(self, rows: NDArray[np.int64]) -> SoftLabels:
        parts, places = [], []
        for shard, positions, local in self._by_shard(rows):
            for block, chosen in _groups(shard.blocks_of(local)):
                parts.append(shard.decode(block, local[chosen], self._codec))
                places.append(positions[chosen])
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate(places))
        return SoftLabels.cat(parts)[torch.from_numpy(order)]

    def _by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Shards, the positions in ``rows`` of what they hold, and the numbers of these rows within the shard."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for owner, positions in _groups(owners):
            yield self._shards[owner], positions, rows[positions] - self._starts[owner]


def _groups(numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each number that occurs, with its positions."""
    order = np.argsort(numbers, kind="stable")
    for positions in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        yield int(numbers[positions[0]]), positions
