"""The later sweeps over a row: the divergences that need probabilities first, and the gradient.

The gradient's sweeps run backwards: a row's last tiles are the ones that the second-level cache holds.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, LOG2E, element, sum_of_values
from kdfast.kernels.rows import load_probs, load_tile, per_group, teacher_side, tile_columns
from kdfast.kernels.softmax import origin_of
from kdfast.kernels.statistics import zscore_gap

__all__ = ["Backward", "Weights", "elements", "gradient", "gradient_on_chip", "gradient_student_only", "settle"]
__all__ += ["value_of_sums"]


class Weights(NamedTuple):
    """The divergence's gradient at the student's scaled logits, given its sums over the row."""

    kd: tl.tensor
    student: tl.tensor  # of e_s and -e_t where the gradient is no more than that
    teacher: tl.tensor
    mean: tl.tensor  # what the mean over the row takes out: of the gap in log2, of the columns that have one, of h
    both: tl.tensor
    target: tl.tensor  # at dkd's label
    mean_g: tl.tensor  # standardize: the gradient's mean, and that of its product with the z-scores
    mean_gz: tl.tensor


class Backward(NamedTuple):
    """What a row's gradient is made of."""

    row: tl.tensor
    stats: tl.tensor
    weights: tl.tensor
    tau: tl.tensor
    zscores: tl.tensor
    by: tl.tensor  # the divergence's parameters
    targets: tl.tensor  # TargetGradient


# ---- values ----------------------------------------------------------------------------------------------------------


@triton.jit
def value_of_sums(s, stats, spec):
    """The divergence of the forward and reverse families, from the first sweep; +inf where a mask makes it so."""
    log_ratio = -stats.log_norm_q if spec.KIND == "soft_ce" else stats.log_norm_gap
    forward = stats.norm_p * (s.cross_t * LN2 + s.sum_exp_t * log_ratio)
    value = forward
    if spec.FAMILY == "reverse":
        value = stats.norm_q * (s.cross_s * LN2 - s.both * stats.log_norm_gap)
        if spec.KIND == "symmetric_kl":
            value = 0.5 * (forward + value)
    return tl.where(s.gap == INF, INF, value)


@triton.jit
def _exponents(tile, stats, tau, spec):
    """(u, v, e_s, e_t): both sides' exponents of 2 and exponentials."""
    u = (tile.x - origin_of(stats.row_max_s)) * tau.scale_log2_s
    v, e_t = u, 0.0
    if spec.TEACHER != "none":
        v, e_t = teacher_side(tile.y, origin_of(stats.row_max_t), tau.scale_log2_t, spec)
    return u, v, tl.exp2(u), e_t


@triton.jit
def _element(u, v, e_s, e_t, stats, by, spec):
    """(q, value, h) of columns."""
    q, p, d = e_s * stats.norm_q, e_t * stats.norm_p, (v - u) * LN2 + stats.log_norm_gap
    log_p, log_q = v * LN2 + stats.log_norm_p, u * LN2 + stats.log_norm_q
    value, h = element(p, q, d, log_p, log_q, by, spec.KIND, spec.CASE)
    return q, value, h


@triton.jit
def elements(row, stats, tau, by, spec):
    """(sum of the values, sum of h) of an element divergence over the columns that no entry takes out."""
    values, slopes = per_group(0.0, spec), per_group(0.0, spec)
    for start in range(0, row.bound, spec.BLOCK):
        tile = load_tile(row, start, spec)
        u, v, e_s, e_t = _exponents(tile, stats, tau, spec)
        _, value, h = _element(u, v, e_s, e_t, stats, by, spec)
        values += tl.sum(value, 1)
        slopes += tl.sum(h, 1)
    slopes = tl.sum(slopes, 0)
    return sum_of_values(tl.sum(values, 0), slopes, spec.KIND), slopes


# ---- gradient --------------------------------------------------------------------------------------------------------


@triton.jit
def _kd_gradient(tile, column, back, spec):
    """(the divergence's gradient in one tile, the student's exponentials)."""
    stats, weights = back.stats, back.weights
    u, v, e_s, e_t = _exponents(tile, stats, back.tau, spec)
    if spec.FAMILY == "forward":
        g = weights.student * e_s - weights.teacher * e_t
    elif spec.FAMILY == "reverse":
        alive = v > -INF
        excess = (tl.where(alive, u - v, 0.0) - weights.mean) * LN2
        excess -= stats.log_norm_gap * (tl.where(alive, 1.0, 0.0) - weights.both)
        q = e_s * stats.norm_q
        g = q * excess
        if spec.KIND == "symmetric_kl":
            g = 0.5 * (g + (q - e_t * stats.norm_p))
        g = tl.where(weights.kd == 0.0, 0.0, weights.kd * g)
    elif spec.FAMILY == "mse":
        alive = (tile.x != -INF) & (tile.y != -INF)
        g = tl.where(alive, weights.kd * zscore_gap(tile.x, tile.y, back.zscores), 0.0)
    else:
        q, _, h = _element(u, v, e_s, e_t, stats, back.by, spec)
        g = tl.where(weights.kd == 0.0, 0.0, weights.kd * (h - q * weights.mean))
    if spec.KIND == "dkd":
        g = tl.where(column == back.row.excluded, weights.target, g)
    return g, e_s


@triton.jit
def _zscore(raw, zscores):
    return (raw - zscores.mean_s) * zscores.inverse_s


@triton.jit
def settle(back, spec):
    """The Weights of standardized logits, with the sums that lead back through the z-scores.

    dx = (g - mean(g) - z mean(g z)) / std, for the gradient g at the z-scores z.
    """
    total, dot = per_group(0.0, spec), per_group(0.0, spec)
    for start in range(0, back.row.bound, spec.BLOCK):
        tile = load_tile(back.row, start, spec)
        g, _ = _kd_gradient(tile, tile_columns(start, spec), back, spec)
        g = tl.where(tile.raw == -INF, 0.0, g)
        total += tl.sum(g, 1)
        dot += tl.sum(tl.where(tile.raw == -INF, 0.0, g * _zscore(tile.raw, back.zscores)), 1)
    count = tl.maximum(back.zscores.count_s, 1.0)
    w, mean_g, mean_gz = back.weights, tl.sum(total, 0) / count, tl.sum(dot, 0) / count
    return Weights(w.kd, w.student, w.teacher, w.mean, w.both, w.target, mean_g, mean_gz)


@triton.jit
def _finish(g, raw, column, row, targets, spec):
    """The gradient with what is left of the targets': exact zeros where the student is masked; NaN in a failed row."""
    g -= targets.uniform
    if spec.LABELS:
        g += tl.where(column == targets.column, targets.at_column, 0.0)
    if spec.PROBS:
        g -= targets.probs * load_probs(row, column)
    return tl.where(raw == -INF, 0.0, g) + targets.poison


@triton.jit
def _write(to, width, tile, column, back, spec, SEPARATE: tl.constexpr):
    """Writes the gradient of one tile; its exponentials at temperature 1 may be ones of their own."""
    g, e_s = _kd_gradient(tile, column, back, spec)
    if spec.STANDARDIZE:
        g = (g - back.weights.mean_g - _zscore(tile.raw, back.zscores) * back.weights.mean_gz) * back.zscores.inverse_s
    if SEPARATE:
        g += back.targets.slope * tl.exp2((tile.x - origin_of(back.stats.row_max_s)) * LOG2E)
    else:
        g += back.targets.slope * tl.where(back.tau.squared, e_s * e_s, e_s)
    g = _finish(g, tile.raw, column, back.row, back.targets, spec)
    if spec.ENTRIES > 0:
        # Entries are written afterwards, in place from the logits that lie here.
        g = tl.where(tile.left_out, tile.raw, g)
    tl.store(to + column, g.to(to.dtype.element_ty), mask=column < width)


@triton.jit
def gradient(to, width, back, spec):
    """Writes the gradient of the first ``width`` columns, last tiles first."""
    tiles = tl.cdiv(width, spec.BLOCK)
    for i in range(tiles):
        start = (tiles - 1 - i) * spec.BLOCK
        column = tile_columns(start, spec)
        tile = load_tile(back.row, start, spec)
        # A branch around it all: inside, it would keep a tile of everything alive.
        if back.tau.separate:
            _write(to, width, tile, column, back, spec, True)
        else:
            _write(to, width, tile, column, back, spec, False)


@triton.jit
def gradient_on_chip(to, width, tiles, back, spec):
    """Writes the gradient of a row in the registers."""
    for i in tl.static_range(spec.TILES_ON_CHIP):
        _write(to, width, tiles[i], tile_columns(i * spec.BLOCK, spec), back, spec, True)


@triton.jit
def gradient_student_only(to, first, width, row, row_max, targets, spec):
    """Writes the gradient of the columns from ``first`` to ``width``, which only the student has.

    ``row_max`` is what its exponentials at temperature 1 are relative to.
    """
    for start in range(first, width, spec.BLOCK):
        column = tile_columns(start, spec)
        x = tl.load(row.student + column, mask=column < row.bound, other=-INF).to(tl.float32)
        g = targets.slope * tl.exp2((x - origin_of(row_max)) * LOG2E)
        g = _finish(g, x, column, row, targets, spec)
        tl.store(to + column, g.to(to.dtype.element_ty), mask=column < width)
