"""What the kernels that decode packed labels share: reading bits anywhere, and where decoded entries go."""

from __future__ import annotations

from typing import NamedTuple

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
    "Limits",
    "Stream",
    "floor_log2",
    "peek",
    "take",
]

LANES = tl.constexpr(32)  # of a warp: rows that are decoded side by side

# What is wrong with a unit, as Decoded.status says it.
CUT_SHORT = tl.constexpr(1)
LEFT_OVER = tl.constexpr(2)
TOO_MANY = tl.constexpr(3)
OUT_OF_BOUNDS = tl.constexpr(4)


class Stream(NamedTuple):
    """A kernel's argument: bytes as aligned 32-bit words, of which every read takes two."""

    words: tl.tensor
    last: tl.tensor  # the last word that a read may begin at

    @classmethod
    def of(cls, data: Tensor) -> Stream:
        """The words of (bytes,) uint8, with two to spare."""
        words = torch.zeros(data.numel() // 4 + 3, dtype=torch.int32, device=data.device)
        words.view(torch.uint8)[: data.numel()] = data
        return cls(words, words.numel() - 2)


class Limits(NamedTuple):
    """A kernel's argument: what rows may hold."""

    max_entries: tl.tensor
    max_rank: tl.tensor  # ranks are below it
    value_limit: tl.tensor  # values are below it


class Decoded(NamedTuple):
    """Rows as the kernels leave them: entry t of a row lies at ``places[row] + LANES * t``.

    How many entries there are is not known before all are decoded, so that each row has room for as many as it may
    have. Lanes are neighbours, for a warp writes one entry of each of its rows at a time.
    """

    columns: Tensor  # (rows, columns) int32, of which the first is the number of entries, at most max_entries
    places: Tensor  # (rows,) int64
    ranks: Tensor  # (groups * max_entries * LANES,) int32, below the vocabulary where there is an entry
    entry_values: Tensor  # likewise, below the limit
    status: Tensor  # (units,) int32: 0, or what is wrong. Then the other tensors hold anything

    @classmethod
    def room(cls, rows: int, groups: int, units: int, columns: int, max_entries: int, device: torch.device) -> Decoded:
        """Memory for so many rows in so many groups of ``LANES``."""

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        slots = groups * max_entries * LANES.value
        return cls(new(rows, columns), new(rows, dtype=torch.int64), new(slots), new(slots), new(units))


@triton.jit
def peek(packed, bit):
    """The next 33 bits at least, as uint64; whatever ``bit`` is, no byte outside the stream is read."""
    word = tl.minimum(tl.maximum(bit >> 5, 0), packed.last)
    low = tl.load(packed.words + word).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(packed.words + word + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32 | low) >> (bit & 31).to(tl.uint64)


@triton.jit
def take(packed, bit):
    """The next 31 bits as int32."""
    return (peek(packed, bit) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def floor_log2(x):
    """The largest power of 2 in integers from 1 to 2^24, by a float's exponent."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
