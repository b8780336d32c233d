"""The parts that only a log wants: the student's entropy at its temperature, and where each side is largest."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2
from kdfast.kernels.rows import columns_of_tile, load_tile
from kdfast.kernels.statistics import origin_of

__all__ = ["Best", "best_of", "best_outside", "entropy"]


class Best(NamedTuple):
    value: tl.tensor
    column: tl.tensor


@triton.jit
def entropy(row, bound, bits, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Of the softmax of a row's first `bound` logits, in nats."""
    top, z = tl.full([BLOCK // WIDTH], -INF, tl.float32), tl.zeros([BLOCK // WIDTH], tl.float32)
    dot = z
    for start in range(0, bound, BLOCK):
        column = start + columns_of_tile(BLOCK, WIDTH)
        x = tl.load(row + column, mask=column < bound, other=-INF).to(tl.float32)
        raised = tl.maximum(top, tl.max(x, 1))
        dot, z = _raise(dot, z, top, raised, bits)
        u = (x - origin_of(raised)[:, None]) * bits
        e = tl.exp2(u)
        z += tl.sum(e, 1)
        dot += tl.sum(tl.where(u == -INF, 0.0, e * u), 1)
        top = raised
    dot, z = _raise(dot, z, top, tl.max(top, 0), bits)
    z, dot = tl.sum(z, 0), tl.sum(dot, 0)
    return tl.where(z == 0.0, 0.0, tl.log(z) - LN2 * dot / z)


@triton.jit
def _raise(dot, z, top, raised, bits):
    factor = tl.exp2((top - origin_of(raised)) * bits)
    shift = (origin_of(top) - origin_of(raised)) * bits
    return tl.where((factor > 0.0) & (z > 0.0), factor * (dot + z * shift), 0.0), factor * z


@triton.jit
def _better(best, value, column):
    """The larger of two candidates, the smaller column where they are equal."""
    wins = (value > best.value) | ((value == best.value) & (column < best.column))
    return Best(tl.where(wins, value, best.value), tl.where(wins, column, best.column))


@triton.jit
def best_of(row, bound, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The first largest of a row's first `bound` values above -inf; column 0 where there is none."""
    best = Best(tl.full([BLOCK // WIDTH], -INF, tl.float32), tl.zeros([BLOCK // WIDTH], tl.int32))
    for start in range(0, bound, BLOCK):
        column = start + columns_of_tile(BLOCK, WIDTH)
        x = tl.load(row + column, mask=column < bound, other=-INF).to(tl.float32)
        value = tl.max(x, 1)
        first = tl.min(tl.where(x == value[:, None], column, 2147483647), 1)
        best = _better(best, value, first)
    return _over_groups(best)


@triton.jit
def best_outside(at, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The first largest of a row's shape outside its entries."""
    best = Best(tl.full([BLOCK // WIDTH], -INF, tl.float32), tl.zeros([BLOCK // WIDTH], tl.int32))
    for start in range(0, at.bound, BLOCK):
        tile = load_tile(at, start, "forward_kl", "shape", BLOCK, WIDTH)
        y = tl.where(tile.taken | (tile.y == 0.0), -INF, tile.y)
        value = tl.max(y, 1)
        column = start + columns_of_tile(BLOCK, WIDTH)
        best = _better(best, value, tl.min(tl.where(y == value[:, None], column, 2147483647), 1))
    return _over_groups(best)


@triton.jit
def _over_groups(best):
    value = tl.max(best.value, 0)
    return Best(value, tl.min(tl.where(best.value == value, best.column, 2147483647), 0))
