"""A running softmax: what its exponentials are relative to, at which temperature, and how two of them are merged.

Exponentials are powers of 2 of (logit - origin) * scale_log2, as in FlashAttention: scale_log2 is log2(e) over the
temperature, and the origin the largest logit so far. A row's entropy and argmax, which only the parts for a log want,
are here, too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, LOG2E
from kdfast.kernels.rows import load_tile, per_group, tile_columns

__all__ = ["Softmax", "SoftmaxStats", "Temperatures", "argmax", "argmax_outside_entries", "entropy", "exp_tau1"]
__all__ += ["merge", "origin_of", "store_parts"]


class Temperatures(NamedTuple):
    """Both sides' temperatures, and what makes the student's tempered exponentials those at temperature 1."""

    scale_log2_s: tl.tensor
    scale_log2_t: tl.tensor
    squared: tl.tensor  # the student's is 2: they are the squares
    separate: tl.tensor  # they have to be computed on their own


class Softmax(NamedTuple):
    """A largest logit, and the sum of the exponentials relative to it."""

    row_max: tl.tensor
    sum_exp: tl.tensor


class SoftmaxStats(NamedTuple):
    """What turns a row's exponentials into probabilities, and their exponents into logarithms (nats)."""

    row_max_s: tl.tensor
    row_max_t: tl.tensor
    norm_q: tl.tensor  # the student's probability is the exponential times this
    norm_p: tl.tensor  # the teacher's
    log_norm_q: tl.tensor
    log_norm_p: tl.tensor
    log_norm_gap: tl.tensor  # log_norm_p - log_norm_q, with fewer roundings


@triton.jit
def origin_of(row_max):
    """A largest logit as an origin: 0 where no logit is finite."""
    return tl.where(row_max == -INF, 0.0, row_max)


@triton.jit
def exp_tau1(e, x, tau):
    """Exponentials at temperature 1 of logits that lie ``x`` above their origin, from the tempered ones."""
    e_tau1 = tl.where(tau.squared, e * e, e)
    if tau.separate:
        e_tau1 = tl.exp2(x * LOG2E)
    return e_tau1


@triton.jit
def merge(a, b, scale_log2):
    """The softmax over two sets of columns."""
    row_max = tl.maximum(a.row_max, b.row_max)
    origin = origin_of(row_max)
    sum_a = a.sum_exp * tl.exp2((a.row_max - origin) * scale_log2)
    return Softmax(row_max, sum_a + b.sum_exp * tl.exp2((b.row_max - origin) * scale_log2))


# ---- for a log -------------------------------------------------------------------------------------------------------


@triton.jit
def entropy(logits, bound, scale_log2, spec):
    """The entropy of the softmax of a row's first ``bound`` logits, in nats."""
    row_max, sum_exp = per_group(-INF, spec), per_group(0.0, spec)
    dot = sum_exp
    for start in range(0, bound, spec.BLOCK):
        column = tile_columns(start, spec)
        x = tl.load(logits + column, mask=column < bound, other=-INF).to(tl.float32)
        raised = tl.maximum(row_max, tl.max(x, 1))
        dot, sum_exp = _raise_origin(dot, sum_exp, row_max, raised, scale_log2)
        u = (x - origin_of(raised)[:, None]) * scale_log2
        e = tl.exp2(u)
        sum_exp += tl.sum(e, 1)
        dot += tl.sum(tl.where(u == -INF, 0.0, e * u), 1)
        row_max = raised
    dot, sum_exp = _raise_origin(dot, sum_exp, row_max, tl.max(row_max, 0), scale_log2)
    sum_exp, dot = tl.sum(sum_exp, 0), tl.sum(dot, 0)
    return tl.where(sum_exp == 0.0, 0.0, tl.log(sum_exp) - LN2 * dot / sum_exp)


@triton.jit
def _raise_origin(dot, sum_exp, row_max, raised, scale_log2):
    """(sum of exponentials times exponents, sum of exponentials) relative to a larger origin."""
    factor = tl.exp2((row_max - origin_of(raised)) * scale_log2)
    shift = (origin_of(row_max) - origin_of(raised)) * scale_log2
    return tl.where((factor > 0.0) & (sum_exp > 0.0), factor * (dot + sum_exp * shift), 0.0), factor * sum_exp


class _Best(NamedTuple):
    value: tl.tensor
    column: tl.tensor


@triton.jit
def _better(best, value, column):
    """The larger of two candidates, the smaller column where they are equal."""
    wins = (value > best.value) | ((value == best.value) & (column < best.column))
    return _Best(tl.where(wins, value, best.value), tl.where(wins, column, best.column))


@triton.jit
def _first_largest(values, column):
    """(largest value of each group, the first column that has it)."""
    value = tl.max(values, 1)
    return value, tl.min(tl.where(values == value[:, None], column, 2147483647), 1)


@triton.jit
def _over_groups(best):
    value = tl.max(best.value, 0)
    return _Best(value, tl.min(tl.where(best.value == value, best.column, 2147483647), 0))


@triton.jit
def argmax(logits, bound, spec):
    """(largest, its column) of a row's first ``bound`` values: the first of equal ones, 0 where none is finite."""
    best = _Best(per_group(-INF, spec), tl.zeros([spec.BLOCK // spec.WIDTH], tl.int32))
    for start in range(0, bound, spec.BLOCK):
        column = tile_columns(start, spec)
        x = tl.load(logits + column, mask=column < bound, other=-INF).to(tl.float32)
        value, first = _first_largest(x, column)
        best = _better(best, value, first)
    return _over_groups(best)


@triton.jit
def argmax_outside_entries(row, spec):
    """(largest, its column) of the row's prototype over the columns that no entry takes out."""
    best = _Best(per_group(-INF, spec), tl.zeros([spec.BLOCK // spec.WIDTH], tl.int32))
    for start in range(0, row.bound, spec.BLOCK):
        tile = load_tile(row, start, spec)
        p = tl.where(tile.left_out | (tile.y == 0.0), -INF, tile.y)
        value, first = _first_largest(p, tile_columns(start, spec))
        best = _better(best, value, first)
    return _over_groups(best)


@triton.jit
def store_parts(parts, row_id, rows, row, c, kd, ce, column_t, spec):
    """Stores the parts of a row that counts, and zeros of another; ``column_t`` is where the teacher is largest."""
    agree = argmax(row.student, row.bound, spec).column == column_t
    h = entropy(row.student, row.bound, c.scale_log2, spec)
    tl.store(parts + row_id, tl.where(c.counts, kd, 0.0))
    tl.store(parts + rows + row_id, tl.where(c.counts, ce, 0.0))
    tl.store(parts + 2 * rows + row_id, tl.where(c.counts, h, 0.0))
    tl.store(parts + 3 * rows + row_id, tl.where(c.counts & agree, 1.0, 0.0))
