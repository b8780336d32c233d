"""Mean and deviation of a row's finite logits, for ``standardize``: groups merge by Chan's formula, in one sweep."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF
from kdfast.kernels.rows import columns_of_tile
from kdfast.kernels.statistics import origin_of

__all__ = ["moments"]


class _Moments(NamedTuple):
    count: tl.tensor
    mean: tl.tensor
    squares: tl.tensor  # of the deviations from the mean


@triton.jit
def _of_tile(x):
    live = x > -INF
    # Relative to the largest, so that a constant row has no deviations at all. NaN must count.
    live = live | (x != x)
    high = origin_of(tl.max(x, 1))
    count = tl.sum(tl.where(live, 1.0, 0.0), 1)
    mean = high + tl.sum(tl.where(live, x - high[:, None], 0.0), 1) / tl.maximum(count, 1.0)
    gap = tl.where(live, x - mean[:, None], 0.0)
    return _Moments(count, mean, tl.sum(gap * gap, 1))


@triton.jit
def _merge(a, b):
    count = tl.maximum(a.count + b.count, 1.0)
    gap, share = b.mean - a.mean, b.count / count
    weight = a.count * share
    squares = a.squares + b.squares + tl.where(weight == 0.0, 0.0, gap * gap * weight)
    return _Moments(a.count + b.count, a.mean + tl.where(share == 0.0, 0.0, gap * share), squares)


@triton.jit
def moments(row, bound, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(mean, 1 / standard deviation, count) of the first `bound` logits; 0 for the second in a constant row."""
    zero = tl.zeros([BLOCK // WIDTH], tl.float32)
    m = _Moments(zero, zero, zero)
    for start in range(0, bound, BLOCK):
        column = start + columns_of_tile(BLOCK, WIDTH)
        m = _merge(m, _of_tile(tl.load(row + column, mask=column < bound, other=-INF).to(tl.float32)))
    some = tl.max(tl.where(m.count > 0.0, m.mean, -INF), 0)
    count = tl.sum(m.count, 0)
    whole = tl.maximum(count, 1.0)
    mean = origin_of(some) + tl.sum(tl.where(m.count > 0.0, m.count * (m.mean - some), 0.0), 0) / whole
    gap = tl.where(m.count > 0.0, m.mean - mean, 0.0)
    squares = tl.sum(m.squares + m.count * gap * gap, 0)
    return mean, tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(squares / whole)), count
