"""Entries of ragged rows: pairs of a class id and a number, those of all rows one after another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Entries", "offsets_of"]


class Entries(NamedTuple):
    """Entries with the row that each belongs to, in ascending order of rows."""

    row: Tensor
    id: Tensor
    weight: Tensor

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor, offsets: Tensor) -> Entries:
        """Row i owns entries ``offsets[i]:offsets[i + 1]``."""
        begin, end = offsets[0], offsets[-1]
        row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=ids.device), offsets.diff())
        return cls(row, ids[begin:end].long(), weights[begin:end])

    def of_rows(self, rows: Tensor) -> Entries:
        """The entries of the rows that a bool mask selects, whose row numbers are counted anew."""
        mine = rows[self.row]
        return Entries((rows.cumsum(0) - 1)[self.row[mine]], self.id[mine], self.weight[mine])

    def best(self, rows: int) -> Tensor:
        """(rows,) the id of each row's largest weight, the first of several; -1 for a row without entries."""
        top = self.weight.new_full((rows,), -math.inf).scatter_reduce(0, self.row, self.weight, "amax")
        place = torch.arange(len(self.row), device=self.row.device)
        place = torch.where(self.weight == top[self.row], place, len(place))
        first = place.new_full((rows,), len(place)).scatter_reduce(0, self.row, place, "amin")
        return torch.cat([self.id, self.id.new_full((1,), -1)])[first]


def offsets_of(counts: Tensor) -> Tensor:
    """(rows + 1,) where each row's entries begin, and where the last one's end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
