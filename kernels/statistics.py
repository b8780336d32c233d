"""The first sweep over a row: both sides' sums of exponentials and what the divergence and the labels need of them.

The exponentials are relative to each group's largest logit so far, and so are the sums that hold logits: large logits
must not cost a small gap its digits. At temperature 1 the student's exponentials are the tempered ones (tau = 1), their
squares (tau = 2), or ones of their own with the same origin.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LOG2E
from kdfast.kernels.rows import columns_of_tile, load_labels, load_tile, teacher_side
from kdfast.kernels.softmax import at_one, origin_of
from kdfast.kernels.targets import Labelled, add_labelled, labelled_over_groups

__all__ = ["Statistics", "ZScores", "moments", "statistics", "statistics_of_held", "z_gap"]


class Statistics(NamedTuple):
    """Of a group of columns, or of the row; logit_mse has its squares in `cross_t` and their number in `both`."""

    top_s: tl.tensor  # largest logits; -inf where there is none
    top_t: tl.tensor
    z_s: tl.tensor  # sums of exponentials
    z_t: tl.tensor
    z_one: tl.tensor  # the student's at temperature 1
    cross_t: tl.tensor  # sum e_t (v - u) in bits; for soft cross-entropy -e_t u
    cross_s: tl.tensor  # sum e_s (u - v) where the teacher is alive
    both: tl.tensor  # sum e_s there
    gap: tl.tensor  # the largest of these gaps: +inf makes the divergence infinite


class ZScores(NamedTuple):
    """Of ``standardize``; 0 and 1 without. A constant row's inverse deviation is 0: it has no scale."""

    mean_s: tl.tensor
    inverse_s: tl.tensor
    count_s: tl.tensor
    mean_t: tl.tensor
    inverse_t: tl.tensor


@triton.jit
def z_gap(x, y, z):
    return (x - z.mean_s) * z.inverse_s - (y - z.mean_t) * z.inverse_t


class _Moments(NamedTuple):
    count: tl.tensor
    mean: tl.tensor
    squares: tl.tensor  # of the deviations from the mean


@triton.jit
def _moments_of_tile(x):
    live = x > -INF
    # Relative to the largest, so that a constant row has no deviations at all. NaN must count.
    live = live | (x != x)
    high = origin_of(tl.max(x, 1))
    count = tl.sum(tl.where(live, 1.0, 0.0), 1)
    mean = high + tl.sum(tl.where(live, x - high[:, None], 0.0), 1) / tl.maximum(count, 1.0)
    gap = tl.where(live, x - mean[:, None], 0.0)
    return _Moments(count, mean, tl.sum(gap * gap, 1))


@triton.jit
def _merge_moments(a, b):
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
        m = _merge_moments(m, _moments_of_tile(tl.load(row + column, mask=column < bound, other=-INF).to(tl.float32)))
    some = tl.max(tl.where(m.count > 0.0, m.mean, -INF), 0)
    count = tl.sum(m.count, 0)
    whole = tl.maximum(count, 1.0)
    mean = origin_of(some) + tl.sum(tl.where(m.count > 0.0, m.count * (m.mean - some), 0.0), 0) / whole
    gap = tl.where(m.count > 0.0, m.mean - mean, 0.0)
    squares = tl.sum(m.squares + m.count * gap * gap, 0)
    return mean, tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(squares / whole)), count


@triton.jit
def _nothing(GROUPS: tl.constexpr):
    zero, low = tl.zeros([GROUPS], tl.float32), tl.full([GROUPS], -INF, tl.float32)
    return Statistics(low, low, zero, zero, zero, zero, zero, zero, low), Labelled(zero, zero, zero, zero)


@triton.jit
def _shifted(cross, z, shift, factor):
    """A sum of exponentials times logarithms, moved: nothing of it is left where the exponentials vanish."""
    return tl.where((factor > 0.0) & (z > 0.0), factor * (cross + z * shift), 0.0)


@triton.jit
def _raise_origin(s, top_s, top_t, scale, KIND: tl.constexpr, FAMILY: tl.constexpr, TEACHER: tl.constexpr):
    """The same sums relative to larger origins."""
    o_s = origin_of(top_s)
    shift_s = (origin_of(s.top_s) - o_s) * scale.student
    r_s = tl.exp2((s.top_s - o_s) * scale.student)
    r_one = at_one(r_s, s.top_s - o_s, scale)
    shift_t, r_t = 0.0, 1.0
    if TEACHER == "logits" and FAMILY != "mse":
        o_t = origin_of(top_t)
        shift_t = (origin_of(s.top_t) - o_t) * scale.teacher
        r_t = tl.exp2((s.top_t - o_t) * scale.teacher)
    cross_t, cross_s, both = s.cross_t, s.cross_s, s.both
    if FAMILY == "forward" or KIND == "symmetric_kl":
        shift = -shift_s if KIND == "soft_ce" else shift_t - shift_s
        cross_t = _shifted(cross_t, s.z_t, shift, r_t)
    if FAMILY == "reverse":
        cross_s = _shifted(cross_s, both, shift_s - shift_t, r_s)
        both = r_s * both
    return Statistics(top_s, top_t, r_s * s.z_s, r_t * s.z_t, r_one * s.z_one, cross_t, cross_s, both, s.gap)


@triton.jit
def _add_gaps(s, u, v, e_s, e_t, KIND: tl.constexpr, FAMILY: tl.constexpr):
    """Adds the cross sums; an infinite gap is told apart from them, where later factors could make it NaN."""
    cross_t, cross_s, both, gap = s.cross_t, s.cross_s, s.both, s.gap
    alive_t = v > -INF
    if FAMILY == "forward" or KIND == "symmetric_kl":
        d = tl.where(alive_t, -u if KIND == "soft_ce" else v - u, 0.0)
        gap = tl.maximum(gap, tl.max(d, 1))
        cross_t += tl.sum(e_t * tl.where(d < INF, d, 0.0), 1)
    if FAMILY == "reverse":
        d = tl.where(u > -INF, u - v, 0.0)
        gap = tl.maximum(gap, tl.max(d, 1))
        cross_s += tl.sum(e_s * tl.where(d < INF, d, 0.0), 1)
        both += tl.sum(tl.where(alive_t, e_s, 0.0), 1)
    return Statistics(s.top_s, s.top_t, s.z_s, s.z_t, s.z_one, cross_t, cross_s, both, gap)


@triton.jit
def _add_squares(s, gap, alive):
    gap = tl.where(alive, gap, 0.0)
    squares = s.cross_t + tl.sum(gap * gap, 1)
    both = s.both + tl.sum(tl.where(alive, 1.0, 0.0), 1)
    return Statistics(s.top_s, s.top_t, s.z_s, s.z_t, s.z_one, squares, s.cross_s, both, s.gap)


@triton.jit
def _add_tile(s, tile, scale, z, KIND: tl.constexpr, FAMILY: tl.constexpr, TEACHER: tl.constexpr):
    top_s, top_t = tl.maximum(s.top_s, tl.max(tile.x, 1)), s.top_t
    if TEACHER == "logits" and FAMILY != "mse":
        top_t = tl.maximum(s.top_t, tl.max(tile.y, 1))
    s = _raise_origin(s, top_s, top_t, scale, KIND, FAMILY, TEACHER)
    origin_s, origin_t = origin_of(top_s)[:, None], origin_of(top_t)[:, None]
    # A branch around it all: inside, it would keep a tile of everything alive.
    if scale.separate:
        s = _add_exponentials(s, tile, origin_s, origin_t, scale, z, KIND, FAMILY, TEACHER, True)
    else:
        s = _add_exponentials(s, tile, origin_s, origin_t, scale, z, KIND, FAMILY, TEACHER, False)
    return s


@triton.jit
def _add_exponentials(
    s,
    tile,
    origin_s,
    origin_t,
    scale,
    z,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    TEACHER: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    """With exponentials of their own at temperature 1, or what makes them of the tempered ones."""
    x = tile.x - origin_s
    u = x * scale.student
    e_s = tl.exp2(u)
    z_s, z_t = s.z_s + tl.sum(e_s, 1), s.z_t
    one = tl.exp2(x * LOG2E) if SEPARATE else tl.where(scale.squared, e_s * e_s, e_s)
    z_one = s.z_one + tl.sum(one, 1)
    if FAMILY == "mse":
        s = _add_squares(s, z_gap(tile.x, tile.y, z), (tile.x != -INF) & (tile.y != -INF))
    elif TEACHER != "none":
        v, e_t = teacher_side(tile.y, origin_t, scale.teacher, KIND, TEACHER)
        s = _add_gaps(s, u, v, e_s, e_t, KIND, FAMILY)
        z_t += tl.sum(e_t, 1)
    return Statistics(
        s.top_s, s.top_t, z_one if FAMILY == "mse" else z_s, z_t, z_one, s.cross_t, s.cross_s, s.both, s.gap
    )


@triton.jit
def _over_groups(s):
    """The row's sums, from those of its groups, which have one origin."""
    return Statistics(
        s.top_s,
        s.top_t,
        tl.sum(s.z_s, 0),
        tl.sum(s.z_t, 0),
        tl.sum(s.z_one, 0),
        tl.sum(s.cross_t, 0),
        tl.sum(s.cross_s, 0),
        tl.sum(s.both, 0),
        tl.max(s.gap, 0),
    )


@triton.jit
def _over_groups_at_once(s):
    """The same as one sum of vectors: between thread blocks every reduction has barriers."""
    infinite = tl.where(s.gap == INF, 1.0, 0.0)
    first = tl.join(tl.join(s.z_s, s.z_t), tl.join(s.z_one, s.cross_t))
    second = tl.join(tl.join(s.cross_s, s.both), tl.join(infinite, infinite))
    first, second = tl.split(tl.sum(tl.join(first, second), 0))
    sides, rest = tl.split(first)
    z_s, z_t = tl.split(sides)
    z_one, cross_t = tl.split(rest)
    sides, rest = tl.split(second)
    cross_s, both = tl.split(sides)
    infinite, _ = tl.split(rest)
    return Statistics(s.top_s, s.top_t, z_s, z_t, z_one, cross_t, cross_s, both, tl.where(infinite > 0.0, INF, 0.0))


@triton.jit
def statistics(
    at,
    scale,
    z,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    TEACHER: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(Statistics, Labelled) of the columns that both sides have."""
    s, labelled = _nothing(BLOCK // WIDTH)
    for start in range(0, at.bound, BLOCK):
        tile = load_tile(at, start, KIND, TEACHER, BLOCK, WIDTH)
        before = origin_of(s.top_s)
        s = _add_tile(s, tile, scale, z, KIND, FAMILY, TEACHER)
        if SMOOTH or at.probs is not None:
            y = tile.raw
            if at.probs is not None:
                y = load_labels(at, start + columns_of_tile(BLOCK, WIDTH))
            origin = origin_of(s.top_s)
            labelled = add_labelled(labelled, tile.raw, y, before - origin, origin, SMOOTH, at.probs is not None)
    before = origin_of(s.top_s)
    s = _raise_origin(s, tl.max(s.top_s, 0), tl.max(s.top_t, 0), scale, KIND, FAMILY, TEACHER)
    labelled = labelled_over_groups(labelled, before, origin_of(s.top_s))
    return _over_groups(s), labelled


@triton.jit
def statistics_of_held(
    at, scale, z, KIND: tl.constexpr, FAMILY: tl.constexpr, HELD: tl.constexpr, GROUPS: tl.constexpr
):
    """The same of a row in the registers, whose largest logits are had first; its labels are not smoothed."""
    s, _ = _nothing(GROUPS)
    top_s, top_t = s.top_s, s.top_t
    for i in tl.static_range(HELD):
        top_s, top_t = tl.maximum(top_s, tl.max(at.held[i].x, 1)), tl.maximum(top_t, tl.max(at.held[i].y, 1))
    top_s, top_t = tl.split(tl.max(tl.join(top_s, top_t), 0))
    s = Statistics(top_s, top_t, s.z_s, s.z_t, s.z_one, s.cross_t, s.cross_s, s.both, s.gap)
    for i in tl.static_range(HELD):
        s = _add_exponentials(s, at.held[i], origin_of(top_s), origin_of(top_t), scale, z, KIND, FAMILY, "logits", True)
    zero = tl.full((), 0.0, tl.float32)
    return _over_groups_at_once(s), Labelled(zero, zero, zero, zero)
