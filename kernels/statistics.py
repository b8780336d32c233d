"""The first sweep over a row: both sides' sums of exponentials, and what the divergence and the targets need of them.

The exponentials are relative to each group's largest logit so far, and so are the sums that hold logits: large logits
must not cost a small gap its digits. At temperature 1 the student's exponentials are the tempered ones (tau = 1), their
squares (tau = 2), or ones of their own with the same origin.

``standardize`` needs a sweep before that one, for the mean and deviation of both sides' logits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LOG2E
from kdfast.kernels.rows import load_probs, load_tile, per_group, teacher_side, tile_columns
from kdfast.kernels.softmax import exp_tau1, origin_of
from kdfast.kernels.targets import TargetSums, add_target_sums, target_sums_over_groups

__all__ = ["Statistics", "ZScores", "no_zscores", "statistics", "statistics_on_chip", "zscore_gap", "zscores_of"]


class Statistics(NamedTuple):
    """Sums over a group of columns, or over the row.

    u and v are the student's and the teacher's exponents of 2, e_s and e_t their exponentials. logit_mse has its
    squares in ``cross_t`` and their number in ``both``.
    """

    row_max_s: tl.tensor  # largest logits; -inf where none is finite
    row_max_t: tl.tensor
    sum_exp_s: tl.tensor
    sum_exp_t: tl.tensor
    sum_exp_tau1: tl.tensor  # the student's at temperature 1
    cross_t: tl.tensor  # sum e_t (v - u); for soft cross-entropy -e_t u
    cross_s: tl.tensor  # sum e_s (u - v) where the teacher is finite
    both: tl.tensor  # sum e_s there
    gap: tl.tensor  # the largest of these gaps: +inf makes the divergence infinite


# ---- standardize -----------------------------------------------------------------------------------------------------


class ZScores(NamedTuple):
    """What makes z-scores of logits. A constant row's inverse deviation is 0: it has no scale."""

    mean_s: tl.tensor
    inverse_s: tl.tensor
    count_s: tl.tensor
    mean_t: tl.tensor
    inverse_t: tl.tensor


@triton.jit
def no_zscores():
    """What leaves logits as they are."""
    return ZScores(0.0, 1.0, 1.0, 0.0, 1.0)


@triton.jit
def zscore_gap(x, y, zscores):
    return (x - zscores.mean_s) * zscores.inverse_s - (y - zscores.mean_t) * zscores.inverse_t


class _Moments(NamedTuple):
    count: tl.tensor
    mean: tl.tensor
    squares: tl.tensor  # sum of squared deviations from the mean


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
    """The moments of two groups together, by Chan's formula."""
    count = tl.maximum(a.count + b.count, 1.0)
    gap, share = b.mean - a.mean, b.count / count
    weight = a.count * share
    squares = a.squares + b.squares + tl.where(weight == 0.0, 0.0, gap * gap * weight)
    return _Moments(a.count + b.count, a.mean + tl.where(share == 0.0, 0.0, gap * share), squares)


@triton.jit
def _moments(logits, bound, spec):
    """(mean, 1 / standard deviation, count) of the first ``bound`` logits; 0 for the second in a constant row."""
    zero = per_group(0.0, spec)
    m = _Moments(zero, zero, zero)
    for start in range(0, bound, spec.BLOCK):
        column = tile_columns(start, spec)
        x = tl.load(logits + column, mask=column < bound, other=-INF).to(tl.float32)
        m = _merge_moments(m, _moments_of_tile(x))
    some = tl.max(tl.where(m.count > 0.0, m.mean, -INF), 0)
    count = tl.sum(m.count, 0)
    whole = tl.maximum(count, 1.0)
    mean = origin_of(some) + tl.sum(tl.where(m.count > 0.0, m.count * (m.mean - some), 0.0), 0) / whole
    gap = tl.where(m.count > 0.0, m.mean - mean, 0.0)
    squares = tl.sum(m.squares + m.count * gap * gap, 0)
    return mean, tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(squares / whole)), count


@triton.jit
def zscores_of(row, spec):
    """The z-scores of a row's two sides, over the columns that both have."""
    mean_s, inverse_s, count_s = _moments(row.student, row.bound_t, spec)
    mean_t, inverse_t, _ = _moments(row.teacher, row.bound_t, spec)
    return ZScores(mean_s, inverse_s, count_s, mean_t, inverse_t)


# ---- one more tile ---------------------------------------------------------------------------------------------------


@triton.jit
def _nothing(spec):
    zero, low = per_group(0.0, spec), per_group(-INF, spec)
    return Statistics(low, low, zero, zero, zero, zero, zero, zero, low), TargetSums(zero, zero, zero, zero)


@triton.jit
def _shifted(cross, sum_exp, shift, factor):
    """A sum of exponentials times logarithms, moved: nothing of it is left where the exponentials vanish."""
    return tl.where((factor > 0.0) & (sum_exp > 0.0), factor * (cross + sum_exp * shift), 0.0)


@triton.jit
def _raise_origin(s, row_max_s, row_max_t, tau, spec):
    """A group's sums, made relative to larger origins."""
    origin_s = origin_of(row_max_s)
    shift_s = (origin_of(s.row_max_s) - origin_s) * tau.scale_log2_s
    factor_s = tl.exp2((s.row_max_s - origin_s) * tau.scale_log2_s)
    factor_tau1 = exp_tau1(factor_s, s.row_max_s - origin_s, tau)
    shift_t, factor_t = 0.0, 1.0
    if spec.TEACHER == "logits" and spec.FAMILY != "mse":
        origin_t = origin_of(row_max_t)
        shift_t = (origin_of(s.row_max_t) - origin_t) * tau.scale_log2_t
        factor_t = tl.exp2((s.row_max_t - origin_t) * tau.scale_log2_t)
    cross_t, cross_s, both = s.cross_t, s.cross_s, s.both
    if spec.FAMILY == "forward" or spec.KIND == "symmetric_kl":
        shift = -shift_s if spec.KIND == "soft_ce" else shift_t - shift_s
        cross_t = _shifted(cross_t, s.sum_exp_t, shift, factor_t)
    if spec.FAMILY == "reverse":
        cross_s = _shifted(cross_s, both, shift_s - shift_t, factor_s)
        both = factor_s * both
    sums = factor_s * s.sum_exp_s, factor_t * s.sum_exp_t, factor_tau1 * s.sum_exp_tau1
    return Statistics(row_max_s, row_max_t, sums[0], sums[1], sums[2], cross_t, cross_s, both, s.gap)


@triton.jit
def _add_gaps(s, u, v, e_s, e_t, spec):
    """Adds the cross sums; an infinite gap is told apart from them, where later factors could make it NaN."""
    cross_t, cross_s, both, gap = s.cross_t, s.cross_s, s.both, s.gap
    alive_t = v > -INF
    if spec.FAMILY == "forward" or spec.KIND == "symmetric_kl":
        d = tl.where(alive_t, -u if spec.KIND == "soft_ce" else v - u, 0.0)
        gap = tl.maximum(gap, tl.max(d, 1))
        cross_t += tl.sum(e_t * tl.where(d < INF, d, 0.0), 1)
    if spec.FAMILY == "reverse":
        d = tl.where(u > -INF, u - v, 0.0)
        gap = tl.maximum(gap, tl.max(d, 1))
        cross_s += tl.sum(e_s * tl.where(d < INF, d, 0.0), 1)
        both += tl.sum(tl.where(alive_t, e_s, 0.0), 1)
    return Statistics(s.row_max_s, s.row_max_t, s.sum_exp_s, s.sum_exp_t, s.sum_exp_tau1, cross_t, cross_s, both, gap)


@triton.jit
def _add_squares(s, gap, alive):
    gap = tl.where(alive, gap, 0.0)
    squares = s.cross_t + tl.sum(gap * gap, 1)
    both = s.both + tl.sum(tl.where(alive, 1.0, 0.0), 1)
    return Statistics(
        s.row_max_s, s.row_max_t, s.sum_exp_s, s.sum_exp_t, s.sum_exp_tau1, squares, s.cross_s, both, s.gap
    )


@triton.jit
def _add_exponentials(s, tile, origin_s, origin_t, tau, zscores, spec, SEPARATE: tl.constexpr):
    """Adds a tile; at temperature 1 with exponentials of their own, or with what makes them of the tempered ones."""
    x = tile.x - origin_s
    u = x * tau.scale_log2_s
    e_s = tl.exp2(u)
    sum_exp_s, sum_exp_t = s.sum_exp_s + tl.sum(e_s, 1), s.sum_exp_t
    e_tau1 = tl.exp2(x * LOG2E) if SEPARATE else tl.where(tau.squared, e_s * e_s, e_s)
    sum_exp_tau1 = s.sum_exp_tau1 + tl.sum(e_tau1, 1)
    if spec.FAMILY == "mse":
        s = _add_squares(s, zscore_gap(tile.x, tile.y, zscores), (tile.x != -INF) & (tile.y != -INF))
        sum_exp_s = sum_exp_tau1
    elif spec.TEACHER != "none":
        v, e_t = teacher_side(tile.y, origin_t, tau.scale_log2_t, spec)
        s = _add_gaps(s, u, v, e_s, e_t, spec)
        sum_exp_t += tl.sum(e_t, 1)
    return Statistics(s.row_max_s, s.row_max_t, sum_exp_s, sum_exp_t, sum_exp_tau1, s.cross_t, s.cross_s, s.both, s.gap)


@triton.jit
def _add_tile(s, tile, tau, zscores, spec):
    row_max_s, row_max_t = tl.maximum(s.row_max_s, tl.max(tile.x, 1)), s.row_max_t
    if spec.TEACHER == "logits" and spec.FAMILY != "mse":
        row_max_t = tl.maximum(s.row_max_t, tl.max(tile.y, 1))
    s = _raise_origin(s, row_max_s, row_max_t, tau, spec)
    origin_s, origin_t = origin_of(row_max_s)[:, None], origin_of(row_max_t)[:, None]
    # A branch around it all: inside, it would keep a tile of everything alive.
    if tau.separate:
        s = _add_exponentials(s, tile, origin_s, origin_t, tau, zscores, spec, True)
    else:
        s = _add_exponentials(s, tile, origin_s, origin_t, tau, zscores, spec, False)
    return s


# ---- the row ---------------------------------------------------------------------------------------------------------


@triton.jit
def _over_groups(s):
    """The row's sums, from those of its groups, which have one origin."""
    return Statistics(
        s.row_max_s,
        s.row_max_t,
        tl.sum(s.sum_exp_s, 0),
        tl.sum(s.sum_exp_t, 0),
        tl.sum(s.sum_exp_tau1, 0),
        tl.sum(s.cross_t, 0),
        tl.sum(s.cross_s, 0),
        tl.sum(s.both, 0),
        tl.max(s.gap, 0),
    )


@triton.jit
def _over_groups_at_once(s):
    """The row's sums by one reduction of vectors: between thread blocks every reduction has barriers."""
    infinite = tl.where(s.gap == INF, 1.0, 0.0)
    first = tl.join(tl.join(s.sum_exp_s, s.sum_exp_t), tl.join(s.sum_exp_tau1, s.cross_t))
    second = tl.join(tl.join(s.cross_s, s.both), tl.join(infinite, infinite))
    first, second = tl.split(tl.sum(tl.join(first, second), 0))
    sides, rest = tl.split(first)
    sum_exp_s, sum_exp_t = tl.split(sides)
    sum_exp_tau1, cross_t = tl.split(rest)
    sides, rest = tl.split(second)
    cross_s, both = tl.split(sides)
    infinite, _ = tl.split(rest)
    gap = tl.where(infinite > 0.0, INF, 0.0)
    return Statistics(s.row_max_s, s.row_max_t, sum_exp_s, sum_exp_t, sum_exp_tau1, cross_t, cross_s, both, gap)


@triton.jit
def statistics(row, tau, zscores, spec):
    """(Statistics, TargetSums) of the columns that both sides have."""
    s, sums = _nothing(spec)
    for start in range(0, row.bound, spec.BLOCK):
        tile = load_tile(row, start, spec)
        before = origin_of(s.row_max_s)
        s = _add_tile(s, tile, tau, zscores, spec)
        if spec.SMOOTH or spec.PROBS:
            y = tile.raw
            if spec.PROBS:
                y = load_probs(row, tile_columns(start, spec))
            origin = origin_of(s.row_max_s)
            sums = add_target_sums(sums, tile.raw, y, before - origin, origin, spec)
    before = origin_of(s.row_max_s)
    s = _raise_origin(s, tl.max(s.row_max_s, 0), tl.max(s.row_max_t, 0), tau, spec)
    sums = target_sums_over_groups(sums, before, origin_of(s.row_max_s))
    return _over_groups(s), sums


@triton.jit
def statistics_on_chip(tiles, tau, zscores, spec):
    """(Statistics, TargetSums) of a row in the registers: its largest logits come first, and no label is smoothed."""
    s, _ = _nothing(spec)
    row_max_s, row_max_t = s.row_max_s, s.row_max_t
    for i in tl.static_range(spec.TILES_ON_CHIP):
        row_max_s = tl.maximum(row_max_s, tl.max(tiles[i].x, 1))
        row_max_t = tl.maximum(row_max_t, tl.max(tiles[i].y, 1))
    row_max_s, row_max_t = tl.split(tl.max(tl.join(row_max_s, row_max_t), 0))
    s = Statistics(row_max_s, row_max_t, s.sum_exp_s, s.sum_exp_t, s.sum_exp_tau1, s.cross_t, s.cross_s, s.both, s.gap)
    for i in tl.static_range(spec.TILES_ON_CHIP):
        s = _add_exponentials(s, tiles[i], origin_of(row_max_s), origin_of(row_max_t), tau, zscores, spec, True)
    zero = tl.full((), 0.0, tl.float32)
    return _over_groups_at_once(s), TargetSums(zero, zero, zero, zero)
