"""Gathering rows from several shards and blocks at once, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast._C import copy_ranges
from kdfast.cache.codecs.base import FixedWidthCodec
from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.shard import Shard, Units
from kdfast.cache.read.decoder import Decoder
from kdfast.cache.read.packed import PackedLabels, join

__all__ = ["RowGatherer", "groups", "ranges"]


class RowGatherer:
    """Gathers rows of some shards. A row is named by its shard's number and its own number in that shard.

    Raises:
        CacheCorruptError: a shard's blocks do not have the lengths that its codec gives them, or too many rows.
        CacheError: a block claims far more rows than its bytes make likely, and the cache is not ``trusted``.
    """

    def __init__(self, shards: Sequence[Shard], decoders: Sequence[Decoder], trusted: bool = False) -> None:
        self._shards, self._decoders = shards, decoders
        self.starts = np.cumsum([0, *(shard.records for shard in shards)])  # each shard's first record
        # Shards in an order that has those of one decoder beside each other, for units are packed by decoder.
        number = {id(decoder): n for n, decoder in reversed(list(enumerate(decoders)))}
        self._order = np.argsort([number[id(decoder)] for decoder in decoders], kind="stable")
        self._rank = np.argsort(self._order)
        for shard, decoder in zip(shards, decoders, strict=True):
            if isinstance(decoder.codec, FixedWidthCodec):
                shard.require_width(decoder.codec)
            elif decoder.codec.rows_per_byte is not None:
                shard.require_room(decoder.codec.rows_per_byte, trusted)

    def spans(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) the shard of each record, and (n, 2) its first row there and its row count; -1 and 0 for -1."""
        owners = np.searchsorted(self.starts, records, side="right") - 1
        spans = np.zeros((len(records), 2), np.int64)
        for owner, places in groups(owners):
            if owner >= 0:
                spans[places] = self._shards[owner].spans(records[places] - self.starts[owner])
        return owners, spans

    def pack(
        self, owners: NDArray[np.int64], rows: NDArray[np.int64], present: NDArray[np.bool_] | None
    ) -> PackedLabels:
        """Pack the labels of rows ``rows[i]`` of shards ``owners[i]``, in that order. Both are ignored where absent.

        Raises:
            CacheCorruptError: naming shard and block.
            CacheError: all rows are absent, and the cache holds none that could stand in for them.
        """
        if present is None or present.all():
            return self._pack(owners, rows)
        place = present.cumsum() - 1  # of each present row among themselves
        kept = self._pack(*((owners[present], rows[present]) if present.any() else self._stand_in()))
        index = torch.from_numpy(np.where(present, place, 0))
        return PackedLabels(kept.data, kept.units, kept.wanted[index], kept.decoders, torch.from_numpy(present))

    def explain(self, owners: NDArray[np.int64], rows: NDArray[np.int64], present: NDArray[np.bool_] | None) -> None:
        """Decode the rows block by block, to raise a ``CacheCorruptError`` that names the shard and block at fault."""
        if present is not None:
            owners, rows = owners[present], rows[present]
        for owner, places in groups(owners):
            shard, local = self._shards[owner], rows[places]
            for block, chosen in groups(shard.blocks_of(local)):
                shard.decode(block, local[chosen], self._decoders[owner].codec)

    def _pack(self, owners: NDArray[np.int64], rows: NDArray[np.int64]) -> PackedLabels:
        parts: list[tuple[int, Units]] = []
        wanted = np.empty(len(rows), np.int64)
        first = 0  # rows of the units so far
        for rank, places in groups(self._rank[owners]):
            owner = int(self._order[rank])
            units = self._shards[owner].units(rows[places], self._decoders[owner].codec)
            wanted[places] = units.wanted + first
            first += int(units.counts.sum())
            parts.append((owner, units))
        data = self._copy(parts)
        counts = np.concatenate([np.empty(0, np.int64), *(units.counts for _, units in parts)])
        lengths = np.concatenate([np.empty(0, np.int64), *(units.ranges[:, 1] for _, units in parts)])
        places = np.stack([lengths.cumsum() - lengths, lengths, counts], 1)
        decoders = join((self._decoders[owner], len(units.counts)) for owner, units in parts)
        if len(decoders) == 1 and isinstance(decoders[0][0].codec, FixedWidthCodec):
            places, decoders = np.array([[0, len(data), first]]), ((decoders[0][0], 1),)  # as one block
        return PackedLabels(
            torch.from_numpy(data),
            torch.from_numpy(places),
            torch.from_numpy(wanted),
            decoders or ((self._decoders[0], 0),),
        )

    def _copy(self, parts: Sequence[tuple[int, Units]]) -> NDArray[np.uint8]:
        payloads = [self._shards[owner].payload() for owner, _ in parts]
        numbers = np.repeat(np.arange(len(parts)), [len(units.counts) for _, units in parts])
        places = np.concatenate([np.empty((0, 2), np.int64), *(units.ranges for _, units in parts)])
        try:
            data: NDArray[np.uint8] = copy_ranges(payloads, numbers, places)
        except ValueError as error:
            names = ", ".join(self._shards[owner].path.name for owner, _ in parts)
            raise CacheCorruptError(f"{self._shards[0].path.parent}: of {names}: {error}") from error
        return data

    def _stand_in(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard and number of some row, which stands in for absent ones."""
        for owner, shard in enumerate(self._shards):
            if shard.rows:
                return np.array([owner]), np.array([0])
        raise CacheError(f"{self._shards[0].path.parent}: holds no row, so that none can be absent")


def groups(numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each distinct number with its positions in ``numbers``."""
    order = np.argsort(numbers, kind="stable")
    for positions in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(order) else ():
        yield int(numbers[positions[0]]), positions


def ranges(begin: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenated ranges ``begin[i] ... begin[i] + sizes[i] - 1``."""
    ends = sizes.cumsum()
    # Number n of the result sits ``n - (ends - sizes)[i]`` past its range's begin.
    numbers: NDArray[np.int64] = np.repeat(begin - (ends - sizes), sizes)
    return numbers + np.arange(len(numbers))
