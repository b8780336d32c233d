"""The later sweeps over a row: the divergences that need probabilities first, and the gradient.

The gradient's sweeps run backwards: a row's last tiles are the ones that the second-level cache holds.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, LOG2E, element, sum_of_values
from kdfast.kernels.rows import columns_of_tile, load_labels, load_tile, teacher_side
from kdfast.kernels.softmax import origin_of
from kdfast.kernels.statistics import z_gap

__all__ = ["Backward", "Ground", "Weights", "elements", "first_value", "gradient", "gradient_beyond"]
__all__ += ["gradient_of_held", "settle"]


class Ground(NamedTuple):
    """The ground truth's gradient: slope * e - share - probs * y, and what one column gets beside."""

    slope: tl.tensor  # of the exponentials at temperature 1
    share: tl.tensor
    probs: tl.tensor
    column: tl.tensor
    at_column: tl.tensor
    poison: tl.tensor  # NaN in a row whose loss is NaN, else 0


class Weights(NamedTuple):
    """The divergence's gradient at the student's scaled logits, given its sums over the row."""

    kd: tl.tensor
    student: tl.tensor  # of e_s and -e_t where the gradient is no more than that
    teacher: tl.tensor
    mean: tl.tensor  # what the mean over the row takes out: of the gap in bits, of the columns that have one, of h
    both: tl.tensor
    target: tl.tensor  # at dkd's label
    mean_g: tl.tensor  # standardize: the gradient's mean, and that of its product with the z-scores
    mean_gz: tl.tensor


class Backward(NamedTuple):
    """What a row's gradient is made of."""

    at: tl.tensor
    link: tl.tensor
    weights: tl.tensor
    scale: tl.tensor
    z: tl.tensor
    by: tl.tensor
    ground: tl.tensor


@triton.jit
def first_value(s, link, KIND: tl.constexpr, FAMILY: tl.constexpr):
    """The divergence of the forward and reverse families, from the first sweep; +inf where a mask makes it so."""
    forward = link.p * (s.cross_t * LN2 + s.z_t * (-link.log_q if KIND == "soft_ce" else link.gap))
    value = forward
    if FAMILY == "reverse":
        value = link.q * (s.cross_s * LN2 - s.both * link.gap)
        if KIND == "symmetric_kl":
            value = 0.5 * (forward + value)
    return tl.where(s.gap == INF, INF, value)


@triton.jit
def _exponents(tile, link, scale, KIND: tl.constexpr, TEACHER: tl.constexpr):
    u = (tile.x - origin_of(link.top_s)) * scale.student
    v, e_t = u, 0.0
    if TEACHER != "none":
        v, e_t = teacher_side(tile.y, origin_of(link.top_t), scale.teacher, KIND, TEACHER)
    return u, v, tl.exp2(u), e_t


@triton.jit
def _element(u, v, e_s, e_t, link, by, KIND: tl.constexpr, CASE: tl.constexpr):
    q, p, d = e_s * link.q, e_t * link.p, (v - u) * LN2 + link.gap
    value, h = element(p, q, d, v * LN2 + link.log_p, u * LN2 + link.log_q, by, KIND, CASE)
    return q, value, h


@triton.jit
def elements(
    at,
    link,
    scale,
    by,
    KIND: tl.constexpr,
    CASE: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(sum of the values, sum of h) over the columns that no entry takes out."""
    values, slopes = tl.zeros([BLOCK // WIDTH], tl.float32), tl.zeros([BLOCK // WIDTH], tl.float32)
    for start in range(0, at.bound, BLOCK):
        tile = load_tile(at, start, KIND, TEACHER, BLOCK, WIDTH)
        u, v, e_s, e_t = _exponents(tile, link, scale, KIND, TEACHER)
        _, value, h = _element(u, v, e_s, e_t, link, by, KIND, CASE)
        values += tl.sum(value, 1)
        slopes += tl.sum(h, 1)
    slopes = tl.sum(slopes, 0)
    return sum_of_values(tl.sum(values, 0), slopes, KIND), slopes


@triton.jit
def _kd_gradient(
    tile,
    column,
    at,
    link,
    weights,
    scale,
    z,
    by,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    TEACHER: tl.constexpr,
):
    """(the divergence's gradient in one tile, the student's exponentials)."""
    u, v, e_s, e_t = _exponents(tile, link, scale, KIND, TEACHER)
    if FAMILY == "forward":
        g = weights.student * e_s - weights.teacher * e_t
    elif FAMILY == "reverse":
        alive = v > -INF
        excess = (tl.where(alive, u - v, 0.0) - weights.mean) * LN2
        excess -= link.gap * (tl.where(alive, 1.0, 0.0) - weights.both)
        q = e_s * link.q
        g = q * excess
        if KIND == "symmetric_kl":
            g = 0.5 * (g + (q - e_t * link.p))
        g = tl.where(weights.kd == 0.0, 0.0, weights.kd * g)
    elif FAMILY == "mse":
        alive = (tile.x != -INF) & (tile.y != -INF)
        g = tl.where(alive, weights.kd * z_gap(tile.x, tile.y, z), 0.0)
    else:
        q, _, h = _element(u, v, e_s, e_t, link, by, KIND, CASE)
        g = tl.where(weights.kd == 0.0, 0.0, weights.kd * (h - q * weights.mean))
    if KIND == "dkd":
        g = tl.where(column == at.target, weights.target, g)
    return g, e_s


@triton.jit
def settle(
    at,
    link,
    weights,
    scale,
    z,
    by,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The weights, with the sums that lead back through the z-scores: dx = (g - mean(g) - z mean(g z)) / std."""
    total, dot = tl.zeros([BLOCK // WIDTH], tl.float32), tl.zeros([BLOCK // WIDTH], tl.float32)
    for start in range(0, at.bound, BLOCK):
        column = start + columns_of_tile(BLOCK, WIDTH)
        tile = load_tile(at, start, KIND, "logits", BLOCK, WIDTH)
        g, _ = _kd_gradient(tile, column, at, link, weights, scale, z, by, KIND, FAMILY, CASE, "logits")
        g = tl.where(tile.raw == -INF, 0.0, g)
        total += tl.sum(g, 1)
        dot += tl.sum(tl.where(tile.raw == -INF, 0.0, g * ((tile.raw - z.mean_s) * z.inverse_s)), 1)
    count = tl.maximum(z.count_s, 1.0)
    w = weights
    return Weights(
        w.kd, w.student, w.teacher, w.mean, w.both, w.target, tl.sum(total, 0) / count, tl.sum(dot, 0) / count
    )


@triton.jit
def _finish(g, raw, column, at, ground, LABELS: tl.constexpr):
    """The ground truth's share, label included; exact zeros where the student is masked; NaN in a row that failed."""
    g -= ground.share
    if LABELS:
        g += tl.where(column == ground.column, ground.at_column, 0.0)
    if at.probs is not None:
        g -= ground.probs * load_labels(at, column)
    return tl.where(raw == -INF, 0.0, g) + ground.poison


@triton.jit
def _write(
    to,
    width,
    tile,
    column,
    row,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    TEACHER: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LABELS: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    """The gradient of one tile, whose exponentials at temperature 1 may be ones of their own."""
    at, link, weights, scale, z, by, ground = row
    g, e_s = _kd_gradient(tile, column, at, link, weights, scale, z, by, KIND, FAMILY, CASE, TEACHER)
    if STANDARDIZE:
        g = (g - weights.mean_g - (tile.raw - z.mean_s) * z.inverse_s * weights.mean_gz) * z.inverse_s
    if SEPARATE:
        g += ground.slope * tl.exp2((tile.x - origin_of(link.top_s)) * LOG2E)
    else:
        g += ground.slope * tl.where(scale.squared, e_s * e_s, e_s)
    g = _finish(g, tile.raw, column, at, ground, LABELS)
    if at.marks is not None:
        # Entries are written afterwards, in place from the logits that lie here.
        g = tl.where(tile.taken, tile.raw, g)
    tl.store(to + column, g.to(to.dtype.element_ty), mask=column < width)


@triton.jit
def _write_tile(
    to,
    width,
    tile,
    column,
    row,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    TEACHER: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LABELS: tl.constexpr,
):
    # A branch around it all: inside, it would keep a tile of everything alive.
    if row.scale.separate:
        _write(to, width, tile, column, row, KIND, FAMILY, CASE, TEACHER, STANDARDIZE, LABELS, True)
    else:
        _write(to, width, tile, column, row, KIND, FAMILY, CASE, TEACHER, STANDARDIZE, LABELS, False)


@triton.jit
def gradient(
    to,
    width,
    row,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    TEACHER: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes the gradient of the first `width` columns, last tiles first."""
    tiles = tl.cdiv(width, BLOCK)
    for i in range(tiles):
        start = (tiles - 1 - i) * BLOCK
        column = start + columns_of_tile(BLOCK, WIDTH)
        tile = load_tile(row.at, start, KIND, TEACHER, BLOCK, WIDTH)
        _write_tile(to, width, tile, column, row, KIND, FAMILY, CASE, TEACHER, STANDARDIZE, LABELS)


@triton.jit
def gradient_of_held(
    to,
    width,
    row,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    LABELS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same of a row in the registers."""
    for i in tl.static_range(HELD):
        column = i * BLOCK + columns_of_tile(BLOCK, WIDTH)
        _write(to, width, row.at.held[i], column, row, KIND, FAMILY, "", "logits", False, LABELS, True)


@triton.jit
def gradient_beyond(to, first, width, at, top, ground, LABELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The same for the columns from `first` to `width`, which only the student has; `top` is its origin there."""
    for start in range(first, width, BLOCK):
        column = start + columns_of_tile(BLOCK, WIDTH)
        x = tl.load(at.student + column, mask=column < at.bound, other=-INF).to(tl.float32)
        g = ground.slope * tl.exp2((x - origin_of(top)) * LOG2E)
        g = _finish(g, x, column, at, ground, LABELS)
        tl.store(to + column, g.to(to.dtype.element_ty), mask=column < width)
