"""The second half of ``select_top``: the few columns that may be among the likeliest, sorted."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.select_row import row_variants, start_of_row

__all__ = ["MOST", "NONE", "SMALL", "VARIANTS", "key_of", "sort_candidates"]

MOST = 64  # columns per row
SMALL = 8  # up to here, half of a warp's lanes hold them
NONE = tl.constexpr(-(1 << 63))  # worse than any column


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
def sort_candidates(
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


# Logits are gathered one by one: neither their dtype nor their alignment makes another kernel.
VARIANTS = [
    row_variants(
        sort_candidates,
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
        name=f"{slots} ",
        warps=1,
    )[0]
    for slots in (SMALL, MOST)
]
