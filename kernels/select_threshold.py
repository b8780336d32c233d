"""``select_threshold``: every probability above tau, and of the others those that systematic sampling hits.

A row is read twice: for its log-sum-exp, and to choose. The cumulative sum of what lies below tau is kept in fixed
point, in units of tau: integers add up exactly, so that no point of the grid is lost or hit twice where tiles meet, and
a hit's place among its row's entries is known without counting the hits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.select_row import BLOCK, WARPS, Logits, forms, load_tile, start_of_row, weigh
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "select_threshold"]

# Bits behind the point. The 12 before it count a tile's points, and those above these its columns above tau.
FRACTION = tl.constexpr(40)
UNIT = tl.constexpr(1 << 40)
ABOVE = tl.constexpr(1 << 52)


class Entries(NamedTuple):
    """A kernel's argument: where the chosen columns go."""

    ids: tl.tensor  # (rows, capacity) int32
    probs: tl.tensor  # likewise, float32
    counts: tl.tensor  # (rows,) int32
    lse: tl.tensor  # (rows,) float32
    capacity: tl.tensor


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


@triton.jit
def entries_in(sum):
    """How many entries a sum stands for."""
    points = sum >> FRACTION
    return ((points & 4095) + (points >> 12)).to(tl.int32)


@triton.jit
def _choose(row, columns, row_max, total, scale_log2, tau, random, ids, probs, capacity, BLOCK: tl.constexpr):
    """Writes a row's entries; how many there are, even of those that have no room."""
    limit = total * tau
    per_unit = tl.minimum(1.0 / limit, 3e38)
    # The sum begins where it passes a multiple of a unit as it exceeds the first point.
    phase = (UNIT - 1) - (random >> (64 - FRACTION)).to(tl.int64)
    count = 0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        e = tl.exp2((load_tile(row, at, columns) - row_max) * scale_log2)
        above = e > limit
        own = tl.where(above, ABOVE, (tl.minimum(e * per_unit, 1.0) * UNIT).to(tl.int64))
        end = phase + tl.cumsum(own, 0)
        before, behind = entries_in(end - own), entries_in(end)
        inside = (behind > before) & (count + before < capacity)
        tl.store(ids + count + before, at, mask=inside)
        tl.store(probs + count + before, tl.where(above, e / total, tau), mask=inside)
        sum = phase + tl.sum(own, 0)
        count += entries_in(sum)
        phase = sum & (UNIT - 1)
    return count


@triton.jit
def _last_column(row, columns, row_max, scale_log2, BLOCK: tl.constexpr):
    """A row's last column with a probability above 0; -1 where there is none."""
    last = -1
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = load_tile(row, at, columns)
        last = tl.maximum(last, tl.max(tl.where(tl.exp2((x - row_max) * scale_log2) > 0.0, at, -1), 0))
    return last


@triton.jit(do_not_specialize=["seed", "first_row"])
def _select_threshold(logits, tau, seed, first_row, out, BLOCK: tl.constexpr):
    row_id = tl.program_id(0)
    row = start_of_row(logits, row_id)
    ids, probs = out.ids + row_id.to(tl.int64) * out.capacity, out.probs + row_id.to(tl.int64) * out.capacity
    row_max, total = weigh(row, logits.columns, logits.scale_log2, BLOCK)
    sound = total > 0.0
    tl.store(out.lse + row_id, tl.where(sound, row_max * logits.inverse_tau + tl.log(total), float("nan")))
    columns = tl.where(sound, logits.columns, 0)
    random = uniform_bits(seed, first_row + row_id)
    count = _choose(row, columns, row_max, total, logits.scale_log2, tau, random, ids, probs, out.capacity, BLOCK)
    # What rounding has left behind the row's last column: a row without an entry above tau has one on the grid.
    last = _last_column(row, tl.where(count == 0, columns, 0), row_max, logits.scale_log2, BLOCK)
    tl.store(ids, last, mask=last >= 0)
    tl.store(probs, tau, mask=last >= 0)
    tl.store(out.counts + row_id, tl.where(last >= 0, 1, tl.minimum(count, out.capacity)))


def _arguments(logits: Tensor, temperature: float, tau: float, seed: int, first_row: int) -> dict[str, Any]:
    rows, columns = logits.shape[0] * logits.shape[1], logits.shape[2]
    capacity = min(columns, math.ceil(1.0 / tau) + 2 if tau * columns > 1.0 else columns)
    entries = Entries(
        logits.new_empty(rows, capacity, dtype=torch.int32),
        logits.new_empty(rows, capacity, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float32),
        capacity,
    )
    argument = Logits.of(logits, temperature)
    choice = {"tau": tau, "seed": seed, "first_row": first_row}
    return {"logits": argument, **choice, "out": entries, "BLOCK": BLOCK, "num_warps": WARPS}


def select_threshold(
    logits: Tensor, temperature: float, tau: float, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns of each row that the threshold sampler keeps, as ``torch.ops.kdfast.select_threshold`` does.

    Args:
        logits: (outer, inner, columns) bfloat16, float16 or float32, of unit stride along the columns.
        temperature: of the softmax.
        tau: probabilities above it are kept, others by systematic sampling with probability p / tau.
        seed, first_row: what the random offset of the first row is derived from; later rows count up.

    Returns:
        (entries,) int32 ids and float32 probabilities, a row's after another's and ascending by id; (rows,) int32
        counts of each row's; (rows,) float32 log-sum-exps. A row with a NaN, +inf or no finite logit has no entries
        and a log-sum-exp of NaN.
    """
    arguments = _arguments(logits, temperature, tau, seed, first_row)
    ids, probs, counts, lse, capacity = arguments["out"]
    if len(counts):
        _select_threshold[(len(counts),)](**arguments)
    kept = torch.arange(capacity, device=counts.device) < counts[:, None]
    at = kept.view(-1).nonzero()[:, 0]
    return ids.view(-1)[at], probs.view(-1)[at], counts, lse


VARIANTS = [
    Variant(name, _select_threshold, _arguments(logits, 1.0, 0.02, 1 << 40, 1 << 40))
    for name, logits in forms().items()
]
