"""``select_threshold``: every probability above tau, and of the others those that systematic sampling hits.

A row is read twice: for its log-sum-exp, and to choose. The cumulative sum of what lies below tau is kept in fixed
point, in units of tau: integers add up exactly, so that no point of the grid is lost or hit twice where tiles meet, and
a hit's place among its row's entries is known without counting the hits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.select_row import BLOCK, WARPS, Rows, load_tile, row_variants, start_of_row, weigh

__all__ = ["VARIANTS", "select_threshold"]

# Bits behind the point. The 12 before it count a tile's points, and those above these its columns above tau.
FRACTION = tl.constexpr(40)
UNIT = tl.constexpr(1 << 40)
ABOVE = tl.constexpr(1 << 52)


@triton.jit
def mix(x):
    """splitmix64's output function, as in kdfast/cache/selection/select.py."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform_bits(seed, row):
    """64 random bits: the row's first uniform number."""
    golden = 0x9E3779B97F4A7C15
    stream = mix(mix(seed.to(tl.uint64) + golden) + (row.to(tl.uint64) + 1) * golden)
    return mix(stream + golden)


@triton.jit(do_not_specialize=["seed", "first_row"])
def _select_threshold(
    logits,
    inner,
    outer_stride,
    inner_stride,
    columns,
    bits,
    inverse,
    tau,
    seed,
    first_row,
    capacity,
    ids,
    probs,
    counts,
    lse,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits = start_of_row(logits, row, inner, outer_stride, inner_stride)
    ids += row.to(tl.int64) * capacity
    probs += row.to(tl.int64) * capacity
    top, total = weigh(logits, columns, bits, BLOCK)
    sound = total > 0.0
    tl.store(lse + row, tl.where(sound, top * inverse + tl.log(total), float("nan")))
    columns = tl.where(sound, columns, 0)
    limit = total * tau
    per_unit = tl.minimum(1.0 / limit, 3e38)
    # The sum begins where it passes a multiple of a unit as it exceeds the first point.
    phase = (UNIT - 1) - (uniform_bits(seed, first_row + row) >> (64 - FRACTION)).to(tl.int64)
    count = 0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = load_tile(logits, at, columns)
        e = tl.exp2((x - top) * bits)
        above = e > limit
        low = (tl.minimum(e * per_unit, 1.0) * UNIT).to(tl.int64)
        own = tl.where(above, ABOVE, low)
        end = phase + tl.cumsum(own, 0)
        start = end - own
        before, behind = passed(start), passed(end)
        inside = (behind > before) & (count + before < capacity)
        tl.store(ids + count + before, at, mask=inside)
        tl.store(probs + count + before, tl.where(above, e / total, tau), mask=inside)
        sum = phase + tl.sum(own, 0)
        count += passed(sum)
        phase = sum & (UNIT - 1)
    # What rounding has left behind the row's last column: a row without an entry above tau has one on the grid.
    columns = tl.where(count == 0, columns, 0)
    last = -1
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = load_tile(logits, at, columns)
        last = tl.maximum(last, tl.max(tl.where(tl.exp2((x - top) * bits) > 0.0, at, -1), 0))
    tl.store(ids, last, mask=last >= 0)
    tl.store(probs, tau, mask=last >= 0)
    tl.store(counts + row, tl.where(last >= 0, 1, tl.minimum(count, capacity)))


@triton.jit
def passed(sum):
    """How many entries a sum stands for."""
    points = sum >> FRACTION
    return ((points & 4095) + (points >> 12)).to(tl.int32)


def select_threshold(
    logits: Tensor, temperature: float, tau: float, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, probs, counts, lse) of (outer, inner, columns) logits in ascending order of columns."""
    rows = Rows(logits, temperature)
    capacity = min(rows.columns, math.ceil(1.0 / tau) + 2 if tau * rows.columns > 1.0 else rows.columns)
    ids = rows.new(rows.count, capacity, dtype=torch.int32)
    probs = rows.new(rows.count, capacity, dtype=torch.float32)
    counts, lse = rows.new(rows.count, dtype=torch.int32), rows.new(rows.count, dtype=torch.float32)
    if rows.count:
        numbers = (rows.bits, rows.inverse, tau, seed, first_row, capacity)
        _select_threshold[(rows.count,)](*rows.place, *numbers, ids, probs, counts, lse, BLOCK=BLOCK, num_warps=WARPS)
    kept = torch.arange(capacity, device=counts.device) < counts[:, None]
    at = kept.view(-1).nonzero()[:, 0]
    return ids.view(-1)[at], probs.view(-1)[at], counts, lse


VARIANTS = row_variants(
    _select_threshold,
    {
        "bits": "fp32",
        "inverse": "fp32",
        "tau": "fp32",
        "seed": "i64",
        "first_row": "i64",
        "capacity": "i32",
        "ids": "*i32",
        "probs": "*fp32",
        "counts": "*i32",
        "lse": "*fp32",
    },
    {"BLOCK": BLOCK},
)
