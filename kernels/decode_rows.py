"""``decode_rows``: rows coded by themselves (FORMAT.md, "coding rows and plain"), a lane each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kdfast.kernels.packed_bits import (
    CUT_SHORT,
    LANES,
    LEFT_OVER,
    OUT_OF_BOUNDS,
    TOO_MANY,
    Decoded,
    Limits,
    Stream,
    take,
)
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "decode_rows"]

WIDTH_BITS = tl.constexpr(5)  # of a column's width in bits, which is 18 at most


class Fields(NamedTuple):
    """A kernel's argument: how wide an entry's fields are, in bits."""

    rank_bits: tl.tensor
    value_bits: tl.tensor


@triton.jit
def take_bits(packed, bit, width):
    """The next ``width`` bits, 31 at most."""
    return take(packed, bit) & ((1 << width) - 1)


@triton.jit
def take_rank(packed, bit, rank_bits, CLASSES: tl.constexpr):
    """(rank, bits that it takes)"""
    if CLASSES:
        kind = take_bits(packed, bit, 2)
        width = tl.where(kind == 3, rank_bits, 5 + 4 * kind)
        rank = tl.where(kind < 2, 32 * kind, tl.where(kind == 2, 32 + 512, 32 + 512 + 8192))
        rank += take_bits(packed, bit + 2, width)
        width += 2
    else:
        rank = take_bits(packed, bit, rank_bits)
        width = tl.zeros_like(rank) + rank_bits
    return rank, width


# A width of 1 would be a constant that cannot be shifted like a tensor.
@triton.jit(do_not_specialize=["widths", "total"])
def _decode_rows(packed, units, rows, widths, fields, total, limits, out, COLUMNS: tl.constexpr, CLASSES: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    row = group * LANES + lane
    inside = row < rows
    at = group * limits.max_entries * LANES + lane
    tl.store(out.places + row, at, mask=inside)
    bit = tl.load(units + row * 3, mask=inside, other=0) * 8
    end = bit + tl.load(units + row * 3 + 1, mask=inside, other=0) * 8
    count = tl.zeros_like(lane)
    for c in tl.static_range(COLUMNS):
        width = ((widths >> (c * WIDTH_BITS)) & 31).to(tl.int32)
        number = take_bits(packed, bit, width)
        bit += width
        tl.store(out.columns + row * COLUMNS + c, number, mask=inside)
        if c == 0:
            count = tl.where(inside, number, 0)
    fault = tl.where(count > limits.max_entries, TOO_MANY, 0)
    count = tl.minimum(count, limits.max_entries)
    lowest = tl.zeros_like(lane)
    spent = tl.zeros_like(lane)
    for t in range(tl.max(count, 0)):
        active = t < count
        rank, taken = take_rank(packed, bit, fields.rank_bits, CLASSES)
        value = take_bits(packed, bit + taken, fields.value_bits)
        good = (rank >= lowest) & (rank < limits.max_rank) & (value < limits.value_limit)
        fault = tl.where(active & (good == 0), OUT_OF_BOUNDS, fault)
        tl.store(out.ranks + at + t * LANES, rank, mask=active & good)
        tl.store(out.entry_values + at + t * LANES, value, mask=active & good)
        bit += tl.where(active, taken + fields.value_bits, 0)
        lowest = rank + 1
        spent += tl.where(active, value + 1, 0)
    fault = tl.where((fault == 0) & inside & (total > 0) & (spent != total), OUT_OF_BOUNDS, fault)
    fault = tl.where((fault == 0) & (bit > end), CUT_SHORT, fault)
    spare = take_bits(packed, bit, tl.maximum(tl.minimum(end - bit, 8), 0).to(tl.int32))  # zeros fill the last byte up
    fault = tl.where((fault == 0) & ((end - bit >= 8) | (spare != 0)), LEFT_OVER, fault)
    tl.store(out.status + row, fault, mask=inside)


def _arguments(
    packed: Stream,
    units: Tensor,
    column_bits: Sequence[int],
    fields: Fields,
    total: int,
    limits: Limits,
    out: Decoded,
    classes: bool,
) -> dict[str, Any]:
    widths = sum(bits << WIDTH_BITS.value * c for c, bits in enumerate(column_bits))
    given = {"packed": packed, "units": units, "rows": len(units), "widths": widths, "fields": fields, "total": total}
    return {**given, "limits": limits, "out": out, "COLUMNS": len(column_bits), "CLASSES": classes, "num_warps": 1}


def decode_rows(
    data: Tensor,
    units: NDArray[np.int64],
    column_bits: Sequence[int],
    rank_bits: int,
    value_bits: int,
    classes: bool,
    total: int,
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
        total: what a row's values, each plus 1, add up to; 0: that varies.
        max_entries: of a row.
        max_rank: ranks are below it.
        value_limit: values are below it.

    Returns:
        The rows, in order. Bytes that are no row are no error here: ``Decoded.status`` says so.
    """
    rows, groups = len(units), -(-len(units) // LANES.value)
    out = Decoded.room(rows, groups, rows, len(column_bits), max_entries, data.device)
    packed, table = Stream.of(data), torch.from_numpy(np.ascontiguousarray(units)).to(data.device)
    fields, limits = Fields(rank_bits, value_bits), Limits(max_entries, max_rank, value_limit)
    if rows:
        _decode_rows[(groups,)](**_arguments(packed, table, column_bits, fields, total, limits, out, classes))
    return out


def _variant(columns: int, classes: bool) -> Variant:
    packed = Stream(torch.empty(99, dtype=torch.int32, device="meta"), 97)
    units = torch.empty(33, 3, dtype=torch.int64, device="meta")
    out = Decoded.room(33, 2, 33, columns, 50, units.device)
    call = _arguments(packed, units, [6, 5, 3][:columns], Fields(17, 5), 13, Limits(50, 50257, 99), out, classes)
    return Variant(f"columns={columns}{' classes' if classes else ''}", _decode_rows, call, gathers=True)


VARIANTS = [_variant(columns, classes) for columns in (1, 2, 3) for classes in (False, True)]
