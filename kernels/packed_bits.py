"""What the kernels that decode packed labels share: reading bits anywhere, and where decoded entries go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "CUT_SHORT",
    "LANES",
    "LEFT_OVER",
    "OUT_OF_BOUNDS",
    "TOO_MANY",
    "Decoded",
    "Stream",
    "floor_log2",
    "peek",
]

LANES = tl.constexpr(32)  # of a warp: rows that are decoded side by side

# What is wrong with a unit, as the kernels say it.
CUT_SHORT = tl.constexpr(1)
LEFT_OVER = tl.constexpr(2)
TOO_MANY = tl.constexpr(3)
OUT_OF_BOUNDS = tl.constexpr(4)


@triton.jit
def peek(stream, last, bit):
    """The next 33 bits at least, as uint64; whatever `bit` is, no byte outside the stream is read."""
    word = tl.minimum(tl.maximum(bit >> 5, 0), last)
    low = tl.load(stream + word).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(stream + word + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32 | low) >> (bit & 31).to(tl.uint64)


@triton.jit
def floor_log2(x):
    """Of integers from 1 to 2^24: a float's exponent."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


class Stream:
    """Bytes as whole words, with two to spare: every read is of two words, and aligned."""

    def __init__(self, data: Tensor) -> None:
        self.words = torch.zeros(data.numel() // 4 + 3, dtype=torch.int32, device=data.device)
        self.words.view(torch.uint8)[: data.numel()] = data
        self.last = self.words.numel() - 2


@dataclass
class Decoded:
    """Rows as the kernels leave them: entry t of a row lies at ``places[row] + LANES * t``.

    How many entries there are is not known before all are decoded, so that each row has room for as many as it may
    have. Lanes are neighbours, for a warp writes one entry of each of its rows at a time.
    """

    columns: Tensor  # (rows, columns) int32, of which the first is the number of entries, at most max_entries
    places: Tensor  # (rows,) int64
    ranks: Tensor  # (groups * max_entries * LANES,) int32, below the vocabulary where there is an entry
    values: Tensor  # likewise, below the limit
    status: Tensor  # (units,) int32: 0, or what is wrong. Then the other tensors hold anything

    @classmethod
    def room(cls, rows: int, groups: int, units: int, columns: int, max_entries: int, device: torch.device) -> Decoded:
        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        slots = groups * max_entries * LANES.value
        return cls(new(rows, columns), new(rows, dtype=torch.int64), new(slots), new(slots), new(units))
