"""``decode_rows``: rows coded by themselves (FORMAT.md, "coding rows and plain"), a lane each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kdfast.kernels.packed_bits import CUT_SHORT, LANES, LEFT_OVER, OUT_OF_BOUNDS, TOO_MANY, Decoded, Stream, peek
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "decode_rows"]

WIDTH_BITS = tl.constexpr(5)  # of a column's width in bits, which is 18 at most


@triton.jit
def take(stream, last, bit, width):
    """The next `width` bits, 31 at most."""
    return (peek(stream, last, bit) & 0x7FFFFFFF).to(tl.int32) & ((1 << width) - 1)


@triton.jit
def take_rank(stream, last, bit, rank_bits, CLASSES: tl.constexpr):
    """(rank, bits that it takes)"""
    if CLASSES:
        kind = take(stream, last, bit, 2)
        width = tl.where(kind == 3, rank_bits, 5 + 4 * kind)
        rank = tl.where(kind < 2, 32 * kind, tl.where(kind == 2, 32 + 512, 32 + 512 + 8192))
        rank += take(stream, last, bit + 2, width)
        width += 2
    else:
        rank = take(stream, last, bit, rank_bits)
        width = tl.zeros_like(rank) + rank_bits
    return rank, width


@triton.jit(do_not_specialize=["widths"])  # a width of 1 would be a constant that cannot be shifted like a tensor
def _decode_rows(
    stream,
    last,
    units,
    rows,
    columns,
    places,
    ranks,
    values,
    status,
    widths,
    rank_bits,
    value_bits,
    max_entries,
    max_rank,
    value_limit,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    row = group * LANES + lane
    inside = row < rows
    at = group * max_entries * LANES + lane
    tl.store(places + row, at, mask=inside)
    bit = tl.load(units + row * 3, mask=inside, other=0) * 8
    end = bit + tl.load(units + row * 3 + 1, mask=inside, other=0) * 8
    count = tl.zeros_like(lane)
    for c in tl.static_range(COLUMNS):
        width = ((widths >> (c * WIDTH_BITS)) & 31).to(tl.int32)
        number = take(stream, last, bit, width)
        bit += width
        tl.store(columns + row * COLUMNS + c, number, mask=inside)
        if c == 0:
            count = tl.where(inside, number, 0)
    fault = tl.where(count > max_entries, TOO_MANY, 0)
    count = tl.minimum(count, max_entries)
    lowest = tl.zeros_like(lane)
    for t in range(tl.max(count, 0)):
        active = t < count
        rank, taken = take_rank(stream, last, bit, rank_bits, CLASSES)
        value = take(stream, last, bit + taken, value_bits)
        good = (rank >= lowest) & (rank < max_rank) & (value < value_limit)
        fault = tl.where(active & (good == 0), OUT_OF_BOUNDS, fault)
        tl.store(ranks + at + t * LANES, rank, mask=active & good)
        tl.store(values + at + t * LANES, value, mask=active & good)
        bit += tl.where(active, taken + value_bits, 0)
        lowest = rank + 1
    fault = tl.where((fault == 0) & (bit > end), CUT_SHORT, fault)
    fault = tl.where((fault == 0) & (end - bit >= 8), LEFT_OVER, fault)
    tl.store(status + row, fault, mask=inside)


def decode_rows(
    data: Tensor,
    units: NDArray[np.int64],
    column_bits: Sequence[int],
    rank_bits: int,
    value_bits: int,
    classes: bool,
    max_entries: int,
    max_rank: int,
    value_limit: int,
) -> Decoded:
    """Rows that are units of their own.

    Args:
        data: (bytes,) uint8, holding the units.
        units: (rows, 3): each one's first byte, its length in bytes, 1: all within ``data``.
        column_bits, rank_bits, value_bits: the fields' widths, 18, 24 and 18 at most.
        classes: ranks come as a class and its own width; else all have ``rank_bits``.
    """
    rows, groups = len(units), -(-len(units) // LANES.value)
    out = Decoded.room(rows, groups, rows, len(column_bits), max_entries, data.device)
    stream, table = Stream(data), torch.from_numpy(np.ascontiguousarray(units)).to(data.device)
    widths = sum(bits << WIDTH_BITS.value * c for c, bits in enumerate(column_bits))
    if rows:
        _decode_rows[(groups,)](
            stream.words,
            stream.last,
            table,
            rows,
            out.columns,
            out.places,
            out.ranks,
            out.values,
            out.status,
            widths,
            rank_bits,
            value_bits,
            max_entries,
            max_rank,
            value_limit,
            COLUMNS=len(column_bits),
            CLASSES=classes,
            num_warps=1,
        )
    return out


VARIANTS = [
    Variant(
        f"columns={columns}{' classes' if classes else ''}",
        _decode_rows,
        {
            "stream": "*i32",
            "last": "i32",
            "units": "*i64",
            "rows": "i32",
            "columns": "*i32",
            "places": "*i64",
            "ranks": "*i32",
            "values": "*i32",
            "status": "*i32",
            "widths": "i32",
            "rank_bits": "i32",
            "value_bits": "i32",
            "max_entries": "i32",
            "max_rank": "i32",
            "value_limit": "i32",
        },
        {"COLUMNS": columns, "CLASSES": classes},
        warps=1,
        gathers=True,
    )
    for columns in (1, 2, 3)
    for classes in (False, True)
]
