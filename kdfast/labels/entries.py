"""Entries of ragged rows: pairs of a class id and a number, those of all rows one after another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Entries", "offsets_of", "rows_of_entries"]


class Entries(NamedTuple):
    """Entries with the row that each belongs to, in ascending order of rows."""

    row: Tensor
    id: Tensor
    weight: Tensor

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor, offsets: Tensor) -> Entries:
        """Row i owns entries ``offsets[i]:offsets[i + 1]``."""
        begin, end = offsets[0], offsets[-1]
        ids = ids[begin:end].long()
        return cls(rows_of_entries(offsets - begin, len(ids)), ids, weights[begin:end])

    def where(self, kept: Tensor) -> Entries:
        """The entries that a bool mask selects."""
        return Entries(self.row[kept], self.id[kept], self.weight[kept])

    def of_rows(self, rows: Tensor) -> Entries:
        """The entries of the rows that a bool mask selects, whose row numbers are counted anew."""
        mine = self.where(rows[self.row])
        return mine._replace(row=(rows.cumsum(0) - 1)[mine.row])

    def best(self, rows: int) -> Tensor:
        """(rows,) the id of each row's largest weight, the first of several; -1 for a row without entries."""
        top = self.weight.new_full((rows,), -math.inf).scatter_reduce(0, self.row, self.weight, "amax")
        place = torch.arange(len(self.row), device=self.row.device)
        place = torch.where(self.weight == top[self.row], place, len(place))
        first = place.new_full((rows,), len(place)).scatter_reduce(0, self.row, place, "amin")
        return torch.cat([self.id, self.id.new_full((1,), -1)])[first]


def rows_of_entries(offsets: Tensor, entries: int) -> Tensor:
    """(entries,) int64: the row that each entry belongs to. Writes nothing elsewhere, whatever the offsets are.

    ``torch.repeat_interleave`` of the rows' counts does the same, and trusts them: it writes past its result where
    offsets go back.
    """
    begun = torch.zeros(entries + 1, dtype=torch.int64, device=offsets.device)
    inner = offsets[1:-1].clamp(0, entries)  # where every row but the first one begins
    return begun.index_add_(0, inner, torch.ones_like(inner))[:entries].cumsum(0)


def offsets_of(counts: Tensor) -> Tensor:
    """(rows + 1,) where each row's entries begin, and where the last one's end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
