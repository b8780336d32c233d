"""A running softmax: its origin, its temperatures, two of them merged; and of a whole row its entropy and where it is
largest, which only a log wants.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, LOG2E
from kdfast.kernels.rows import columns_of_tile, load_tile

__all__ = ["Best", "Link", "Scale", "Softmax", "at_one", "best_of", "best_outside", "entropy", "merge", "origin_of"]


class Scale(NamedTuple):
    """log2(e) / tau of each side, and what makes the tempered exponentials those at temperature 1."""

    student: tl.tensor
    teacher: tl.tensor
    squared: tl.tensor
    separate: tl.tensor


class Softmax(NamedTuple):
    """A largest logit and the sum of the exponentials relative to it."""

    top: tl.tensor
    z: tl.tensor


class Link(NamedTuple):
    """What turns a row's exponentials into probabilities, and their exponents into logarithms (nats)."""

    top_s: tl.tensor
    top_t: tl.tensor
    q: tl.tensor
    p: tl.tensor
    log_q: tl.tensor
    log_p: tl.tensor
    gap: tl.tensor  # log_p - log_q, with fewer roundings


@triton.jit
def origin_of(top):
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def at_one(e, x, scale):
    """Exponentials at temperature 1 of logits `x` that lie above their origin, from the tempered ones."""
    one = tl.where(scale.squared, e * e, e)
    if scale.separate:
        one = tl.exp2(x * LOG2E)
    return one


@triton.jit
def merge(a, b, bits):
    """The softmax over two sets of columns."""
    top = tl.maximum(a.top, b.top)
    origin = origin_of(top)
    return Softmax(top, a.z * tl.exp2((a.top - origin) * bits) + b.z * tl.exp2((b.top - origin) * bits))


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
