"""``select_top``: the likeliest columns, and what they leave.

A row is read twice. The first sweep sums it, and keeps the best column of each of some groups: the k-th best of these
is no better than the row's k-th best. The second sweep adds up what is worse, and notes the others, hardly more than k,
by their ids. A second kernel sorts these. No row is sorted, and what the likeliest leave is a sum of what they leave.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.select_row import BLOCK, LOWEST, WARPS, Rows, load_tile, row_variants, start_of_row, weigh_tile

__all__ = ["MOST", "VARIANTS", "select_top"]

MOST = 64  # columns per row
SMALL = 8  # up to here, half of a warp's lanes hold them
NONE = tl.constexpr(-(1 << 63))  # worse than any column
GROUPS_EACH = tl.constexpr(4)  # groups per column: of random rows a third of k too many columns are noted


@triton.jit
def pick(keys, index):
    """One of some keys."""
    return tl.max(tl.where(tl.arange(0, keys.shape[0]) == index, keys, NONE), 0)


@triton.jit
def _note_candidates(
    logits,
    inner,
    outer_stride,
    inner_stride,
    columns,
    bits,
    inverse,
    k,
    capacity,
    ids,
    counts,
    sums,
    lse,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0)
    logits = start_of_row(logits, row, inner, outer_stride, inner_stride)
    ids += row.to(tl.int64) * capacity
    lane = tl.arange(0, BLOCK)
    top, total = tl.full([], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    best, best_at = tl.full([BLOCK], float("-inf"), tl.float32), lane
    for begin in range(0, columns, BLOCK):
        at = begin + lane
        x = load_tile(logits, at, columns)
        top, total = weigh_tile(x, top, total, bits)
        better = x > best
        best, best_at = tl.where(better, x, best), tl.where(better, at, best_at)
    z = tl.sum(total, 0)
    sound = z > 0.0
    tl.store(lse + row, tl.where(sound, top * inverse + tl.log(z), float("nan")))
    columns = tl.where(sound, columns, 0)
    keys = tl.where(best > float("-inf"), key_of(best, best_at), NONE)
    keys = tl.max(tl.reshape(keys, [BLOCK // GROUPS, GROUPS]), 0)
    least = pick(tl.sort(keys, descending=True), k - 1)
    rest = tl.zeros([BLOCK], tl.float32)
    count = 0
    for begin in range(0, columns, BLOCK):
        at = begin + lane
        x = load_tile(logits, at, columns)
        e = tl.exp2((x - top) * bits)
        noted = (key_of(x, at) >= least) & (e > 0.0)
        rest += tl.where(noted, 0.0, e)
        places = tl.cumsum(noted.to(tl.int32), 0)
        tl.store(ids + count + places - 1, at, mask=noted & (count + places <= capacity))
        count += tl.sum(noted.to(tl.int32), 0)
    tl.store(counts + row, tl.minimum(count, capacity))
    tl.store(sums + row * 3, z)
    tl.store(sums + row * 3 + 1, tl.sum(rest, 0))
    tl.store(sums + row * 3 + 2, top)


@triton.jit
def key_of(x, id):
    """What orders columns: the logit, then the smaller id."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)


@triton.jit
def id_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def logit_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sort_candidates(
    logits,
    inner,
    outer_stride,
    inner_stride,
    columns,
    bits,
    k,
    capacity,
    noted,
    counts,
    sums,
    ids,
    probs,
    rests,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    logits = start_of_row(logits, row, inner, outer_stride, inner_stride)
    noted += row.to(tl.int64) * capacity
    z, rest, top = tl.load(sums + row * 3), tl.load(sums + row * 3 + 1), tl.load(sums + row * 3 + 2)
    count = tl.load(counts + row)
    place = tl.arange(0, WIDTH)
    # The best so far come first; the others are added to the rest, and make room for new ones.
    keys = tl.full([WIDTH], NONE, tl.int64)
    for begin in range(0, count, WIDTH - SLOTS):
        at = begin + place - SLOTS
        new = (place >= SLOTS) & (at < count)
        id = tl.load(noted + at, mask=new, other=0)
        x = tl.load(logits + id, mask=new, other=0.0).to(tl.float32)
        keys = tl.sort(tl.where(new, key_of(x, id), keys), descending=True)
        lost = (place >= k) & (keys != NONE)
        rest += tl.sum(tl.where(lost, tl.exp2((logit_of(keys) - top) * bits), 0.0), 0)
        keys = tl.where(place < k, keys, NONE)
    there = keys != NONE
    share = tl.where(there, tl.exp2((logit_of(keys) - top) * bits) / z, 0.0)
    tl.store(ids + row * k + place, tl.where(there, id_of(keys), 0), mask=place < k)
    tl.store(probs + row * k + place, share.to(tl.float64), mask=place < k)
    tl.store(rests + row, tl.where(z > 0.0, rest / z, 0.0).to(tl.float64))


def select_top(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, probs, rest, lse) of (outer, inner, columns) logits; k from 1 to ``MOST``."""
    rows = Rows(logits, temperature)
    slots = SMALL if k <= SMALL else MOST
    groups = slots * GROUPS_EACH.value
    # Whatever is better than the k-th best group's best lies in the k - 1 groups before it.
    capacity = min(rows.columns, (k - 1) * -(-rows.columns // groups) + 1)
    noted, counts = rows.new(rows.count, capacity, dtype=torch.int32), rows.new(rows.count, dtype=torch.int32)
    sums, lse = rows.new(rows.count, 3, dtype=torch.float32), rows.new(rows.count, dtype=torch.float32)
    ids, probs = rows.new(rows.count, k, dtype=torch.int32), rows.new(rows.count, k, dtype=torch.float64)
    rest = rows.new(rows.count, dtype=torch.float64)
    if rows.count:
        _note_candidates[(rows.count,)](
            *rows.place,
            rows.bits,
            rows.inverse,
            k,
            capacity,
            noted,
            counts,
            sums,
            lse,
            BLOCK=max(BLOCK, groups),
            GROUPS=groups,
            num_warps=WARPS,
        )
        _sort_candidates[(rows.count,)](
            *rows.place,
            rows.bits,
            k,
            capacity,
            noted,
            counts,
            sums,
            ids,
            probs,
            rest,
            SLOTS=slots,
            WIDTH=2 * slots,
            num_warps=1,
        )
    return ids, probs, rest, lse


VARIANTS = [
    variant
    for slots in (SMALL, MOST)
    for variant in row_variants(
        _note_candidates,
        {
            "bits": "fp32",
            "inverse": "fp32",
            "k": "i32",
            "capacity": "i32",
            "ids": "*i32",
            "counts": "*i32",
            "sums": "*fp32",
            "lse": "*fp32",
        },
        {"BLOCK": BLOCK, "GROUPS": slots * GROUPS_EACH.value},
        name=f"{slots} ",
    )
]

# Logits are gathered one by one: neither their dtype nor their alignment makes another kernel.
VARIANTS += [
    row_variants(
        _sort_candidates,
        {
            "bits": "fp32",
            "k": "i32",
            "capacity": "i32",
            "noted": "*i32",
            "counts": "*i32",
            "sums": "*fp32",
            "ids": "*i32",
            "probs": "*fp64",
            "rests": "*fp64",
        },
        {"SLOTS": slots, "WIDTH": 2 * slots},
        name=f"sort {slots} ",
        warps=1,
        gathers=True,
    )[0]
    for slots in (SMALL, MOST)
]
