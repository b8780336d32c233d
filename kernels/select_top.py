"""``select_top``: the likeliest columns, and what they leave.

A row is read twice. The first sweep sums it, and keeps the best column of each of some groups: the k-th best of these
is no better than the row's k-th best. The second sweep adds up what is worse, and notes the others, hardly more than k,
by their ids. A second kernel sorts these. No row is sorted, and what the likeliest leave is a sum of what they leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.select_row import BLOCK, LOWEST, WARPS, Logits, forms, load_tile, start_of_row, weigh_tile
from kdfast.kernels.variant import Variant

__all__ = ["MOST", "VARIANTS", "select_top"]

MOST = 64  # columns per row
SMALL = 8  # up to here, half of a warp's lanes hold them
NONE = tl.constexpr(-(1 << 63))  # a key worse than any column's
GROUPS_EACH = 4  # groups per column: of random rows a third of k too many columns are noted


class Candidates(NamedTuple):
    """A kernel's argument: the columns that may be among the likeliest, and sums over the others."""

    ids: tl.tensor  # (rows, capacity) int32
    counts: tl.tensor  # (rows,) int32
    sums: tl.tensor  # (rows, 3) float32: of all exponentials, of the others', and what they are relative to
    capacity: tl.tensor


class Likeliest(NamedTuple):
    """A kernel's argument: where the likeliest columns go."""

    ids: tl.tensor  # (rows, k) int32
    probs: tl.tensor  # (rows, k) float64
    rest: tl.tensor  # (rows,) float64


# ---- keys: what orders columns ---------------------------------------------------------------------------------------


@triton.jit
def key_of(x, id):
    """An int64 that orders columns by their logit, then by the smaller id."""
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
def pick(keys, index):
    """One of some keys."""
    return tl.max(tl.where(tl.arange(0, keys.shape[0]) == index, keys, NONE), 0)


# ---- the two kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _best_of_groups(row, columns, scale_log2, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """(largest logit, sum of the exponentials, (GROUPS,) keys of the best column of each group)."""
    lane = tl.arange(0, BLOCK)
    row_max, sums = tl.full([], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    best, best_at = tl.full([BLOCK], float("-inf"), tl.float32), lane
    for begin in range(0, columns, BLOCK):
        at = begin + lane
        x = load_tile(row, at, columns)
        row_max, sums = weigh_tile(x, row_max, sums, scale_log2)
        better = x > best
        best, best_at = tl.where(better, x, best), tl.where(better, at, best_at)
    keys = tl.where(best > float("-inf"), key_of(best, best_at), NONE)
    return row_max, tl.sum(sums, 0), tl.max(tl.reshape(keys, [BLOCK // GROUPS, GROUPS]), 0)


@triton.jit
def _note_candidates(logits, k, candidates, lse, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    row_id = tl.program_id(0)
    row = start_of_row(logits, row_id)
    ids, capacity = candidates.ids + row_id.to(tl.int64) * candidates.capacity, candidates.capacity
    row_max, sum_exp, keys = _best_of_groups(row, logits.columns, logits.scale_log2, BLOCK, GROUPS)
    sound = sum_exp > 0.0
    tl.store(lse + row_id, tl.where(sound, row_max * logits.inverse_tau + tl.log(sum_exp), float("nan")))
    columns = tl.where(sound, logits.columns, 0)
    least = pick(tl.sort(keys, descending=True), k - 1)
    rest = tl.zeros([BLOCK], tl.float32)
    count = 0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = load_tile(row, at, columns)
        e = tl.exp2((x - row_max) * logits.scale_log2)
        noted = (key_of(x, at) >= least) & (x > float("-inf"))
        rest += tl.where(noted, 0.0, e)
        places = tl.cumsum(noted.to(tl.int32), 0)
        tl.store(ids + count + places - 1, at, mask=noted & (count + places <= capacity))
        count += tl.sum(noted.to(tl.int32), 0)
    tl.store(candidates.counts + row_id, tl.minimum(count, capacity))
    tl.store(candidates.sums + row_id * 3, sum_exp)
    tl.store(candidates.sums + row_id * 3 + 1, tl.sum(rest, 0))
    tl.store(candidates.sums + row_id * 3 + 2, row_max)


@triton.jit
def _sort_candidates(logits, k, candidates, out, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    row_id = tl.program_id(0)
    row = start_of_row(logits, row_id)
    noted, sums = candidates.ids + row_id.to(tl.int64) * candidates.capacity, candidates.sums + row_id * 3
    sum_exp, rest, row_max = tl.load(sums), tl.load(sums + 1), tl.load(sums + 2)
    count = tl.load(candidates.counts + row_id)
    place = tl.arange(0, WIDTH)
    # The best so far come first; the others are added to the rest, and make room for new ones.
    keys = tl.full([WIDTH], NONE, tl.int64)
    for begin in range(0, count, WIDTH - SLOTS):
        at = begin + place - SLOTS
        new = (place >= SLOTS) & (at < count)
        id = tl.load(noted + at, mask=new, other=0)
        x = tl.load(row + id, mask=new, other=0.0).to(tl.float32)
        keys = tl.sort(tl.where(new, key_of(x, id), keys), descending=True)
        lost = (place >= k) & (keys != NONE)
        rest += tl.sum(tl.where(lost, tl.exp2((logit_of(keys) - row_max) * logits.scale_log2), 0.0), 0)
        keys = tl.where(place < k, keys, NONE)
    there = keys != NONE
    share = tl.where(there, tl.exp2((logit_of(keys) - row_max) * logits.scale_log2) / sum_exp, 0.0)
    tl.store(out.ids + row_id * k + place, tl.where(there, id_of(keys), 0), mask=place < k)
    tl.store(out.probs + row_id * k + place, share.to(tl.float64), mask=place < k)
    tl.store(out.rest + row_id, tl.where(sum_exp > 0.0, rest / sum_exp, 0.0).to(tl.float64))


# ---- launch ----------------------------------------------------------------------------------------------------------


def _arguments(logits: Tensor, temperature: float, k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the two kernels."""
    rows, columns = logits.shape[0] * logits.shape[1], logits.shape[2]
    slots = SMALL if k <= SMALL else MOST
    groups = slots * GROUPS_EACH
    # Whatever is better than the k-th best group's best lies in the k - 1 groups before it.
    capacity = min(columns, (k - 1) * -(-columns // groups) + 1)
    candidates = Candidates(
        logits.new_empty(rows, capacity, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, 3, dtype=torch.float32),
        capacity,
    )
    out = Likeliest(
        logits.new_empty(rows, k, dtype=torch.int32),
        logits.new_empty(rows, k, dtype=torch.float64),
        logits.new_empty(rows, dtype=torch.float64),
    )
    both = {"logits": Logits.of(logits, temperature), "k": k, "candidates": candidates}
    lse = logits.new_empty(rows, dtype=torch.float32)
    return (
        {**both, "lse": lse, "BLOCK": max(BLOCK, groups), "GROUPS": groups, "num_warps": WARPS},
        {**both, "out": out, "SLOTS": slots, "WIDTH": 2 * slots, "num_warps": 1},
    )


def select_top(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest columns of each row, as ``torch.ops.kdfast.select_top`` gives them.

    Args:
        logits: (outer, inner, columns) bfloat16, float16 or float32, of unit stride along the columns.
        temperature: of the softmax.
        k: from 1 to ``MOST``.

    Returns:
        (rows, k) int32 ids and float64 probabilities, the likeliest first and the smaller id first of equal ones;
        (rows,) float64 probability of all other columns; (rows,) float32 log-sum-exps. Where a row has fewer columns
        than k, or a NaN or +inf, ids and probabilities are 0.
    """
    note, sort = _arguments(logits, temperature, k)
    rows = len(note["lse"])
    if rows:
        _note_candidates[(rows,)](**note)
        _sort_candidates[(rows,)](**sort)
    return *sort["out"], note["lse"]


VARIANTS = [
    Variant(f"{k} {name}", _note_candidates, _arguments(logits, 1.0, k)[0])
    for k in (SMALL, MOST)
    for name, logits in forms().items()
]
# Logits are gathered one by one: neither their dtype nor their alignment makes another kernel.
VARIANTS += [
    Variant(f"sort {k}", _sort_candidates, _arguments(forms()["bfloat16"], 1.0, k)[1], gathers=True)
    for k in (SMALL, MOST)
]
