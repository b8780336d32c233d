"""``RecordIndex``: records that have been looked up, so that a training loop hashes its keys once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RecordIndex"]


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
