"""The terms against targets, at temperature 1: cross-entropy with labels or class probabilities, smoothing, z-loss.

With e the student's exponentials and y the targets' probabilities, the gradient at a logit is slope * e - uniform -
label * y, where smoothing takes ``uniform`` from every column.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LOG2E
from kdfast.kernels.rows import coefficients, load_probs, row_pointer, tile_columns
from kdfast.kernels.softmax import Softmax, merge, origin_of

__all__ = ["Label", "TargetGradient", "TargetSums", "TargetTerms", "Targets", "add_student_only", "add_target_sums"]
__all__ += ["at_left_out_label", "known_cross_entropy", "open_row", "target_gradient", "target_sums_over_groups"]
__all__ += ["target_terms", "with_origin"]


class Targets(NamedTuple):
    """A kernel's argument: labels, class probabilities, or neither."""

    ids: tl.tensor  # (rows,) int64
    probs: tl.tensor  # kdfast.kernels.rows.StridedRows
    smoothing: tl.tensor


class Label(NamedTuple):
    """A row's label; -1 and -inf where it is none of the row's columns."""

    column: tl.tensor
    logit: tl.tensor
    found: tl.tensor


class Opened(NamedTuple):
    """What both row ops begin a row with."""

    coefficients: tl.tensor
    logits: tl.tensor  # pointer to the student's
    probs: tl.tensor  # pointer to the class probabilities; without any, the student's again
    label: tl.tensor


class TargetSums(NamedTuple):
    """What smoothing and class probabilities need: logits x relative to the student's origin."""

    count: tl.tensor  # finite columns
    total: tl.tensor  # sum x
    mass: tl.tensor  # sum y
    dot: tl.tensor  # sum y x


class TargetTerms(NamedTuple):
    """The terms' values, and their gradient's weights."""

    ce: tl.tensor
    lse: tl.tensor  # the log-sum-exp, whose square is the z-loss
    slope: tl.tensor  # of the student's probabilities
    uniform: tl.tensor
    label: tl.tensor


class TargetGradient(NamedTuple):
    """The gradient at every logit, and what one column gets besides."""

    slope: tl.tensor  # of the exponentials at temperature 1, relative to an origin
    uniform: tl.tensor
    probs: tl.tensor
    column: tl.tensor  # the label's
    at_column: tl.tensor
    poison: tl.tensor  # NaN in a row whose loss is NaN, else 0


@triton.jit
def _label_of(targets, row_id, logits, columns, counts, spec):
    """The row's label; its logit is read only where the row counts."""
    label = Label(-1, -INF, False)
    if spec.LABELS:
        column = tl.load(targets.ids + row_id)
        found = (column >= 0) & (column < columns)
        column = tl.where(found, column, -1).to(tl.int32)
        label = Label(column, tl.load(logits + column, mask=found & counts, other=-INF).to(tl.float32), found)
    return label


@triton.jit
def open_row(row_id, student, targets, coef, sizes, spec):
    """A row's Opened."""
    c = coefficients(coef, row_id, sizes.rows, spec)
    logits = row_pointer(student, row_id, sizes.inner)
    probs = logits
    if spec.PROBS:
        probs = row_pointer(targets.probs, row_id, sizes.inner)
    return Opened(c, logits, probs, _label_of(targets, row_id, logits, sizes.columns, c.counts, spec))


# ---- sums over the row -----------------------------------------------------------------------------------------------


@triton.jit
def add_target_sums(sums, raw, y, down, origin, spec):
    """The groups' sums with one more tile, whose origin lies ``down`` from that of the sums so far."""
    count, total, mass, dot = sums
    x = raw - origin[:, None]
    if spec.SMOOTH:
        live = raw > -INF
        total += count * down + tl.sum(tl.where(live, x, 0.0), 1)
        count += tl.sum(tl.where(live, 1.0, 0.0), 1)
    if spec.PROBS:
        dot += mass * down + tl.sum(tl.where(y == 0.0, 0.0, y * x), 1)
        mass += tl.sum(y, 1)
    return TargetSums(count, total, mass, dot)


@triton.jit
def target_sums_over_groups(sums, origins, origin):
    """The row's sums, from those of its groups, each relative to an origin of its own."""
    down = origins - origin
    return TargetSums(
        tl.sum(sums.count, 0),
        tl.sum(sums.total + sums.count * down, 0),
        tl.sum(sums.mass, 0),
        tl.sum(sums.dot + sums.mass * down, 0),
    )


@triton.jit
def _add_student_only_tile(softmax, sums, row, start, spec):
    column = tile_columns(start, spec)
    x = tl.load(row.student + column, mask=column < row.bound, other=-INF).to(tl.float32)
    row_max = tl.maximum(softmax.row_max, tl.max(tl.max(x, 1), 0))
    origin, down = origin_of(row_max), origin_of(softmax.row_max) - origin_of(row_max)
    sum_exp = softmax.sum_exp * tl.exp2((softmax.row_max - origin) * LOG2E)
    sum_exp += tl.sum(tl.sum(tl.exp2((x - origin) * LOG2E), 1), 0)
    count, total, mass, dot = sums
    if spec.SMOOTH:
        live = x > -INF
        total += count * down + tl.sum(tl.sum(tl.where(live, x - origin, 0.0), 1), 0)
        count += tl.sum(tl.sum(tl.where(live, 1.0, 0.0), 1), 0)
    if spec.PROBS:
        y = load_probs(row, column)
        dot += mass * down + tl.sum(tl.sum(tl.where(y == 0.0, 0.0, y * (x - origin)), 1), 0)
        mass += tl.sum(tl.sum(y, 1), 0)
    return Softmax(row_max, sum_exp), TargetSums(count, total, mass, dot)


@triton.jit
def add_student_only(softmax_tau1, sums, row, first, spec):
    """Softmax and sums with the columns from ``first`` on, which only the student has: they count for targets alone."""
    for start in range(first, row.bound, spec.BLOCK):
        softmax_tau1, sums = _add_student_only_tile(softmax_tau1, sums, row, start, spec)
    return softmax_tau1, sums


# ---- values and gradient ---------------------------------------------------------------------------------------------


@triton.jit
def target_terms(softmax_tau1, sums, left_out, c, label, smoothing, spec):
    """(the student's softmax at temperature 1 over its whole row, TargetTerms).

    ``left_out`` is the softmax over the columns that the sweep left out. ``sums`` are relative to the origin of
    ``softmax_tau1`` as it comes in.
    """
    origin = origin_of(softmax_tau1.row_max)
    softmax_tau1 = merge(softmax_tau1, left_out, LOG2E)
    dead = softmax_tau1.sum_exp == 0.0
    row_max, log_sum = origin_of(softmax_tau1.row_max), tl.log(tl.where(dead, 1.0, softmax_tau1.sum_exp))
    down = origin - row_max
    lse = row_max + log_sum
    mass, hard = 1.0, tl.where(label.found, (row_max - label.logit) + log_sum, float("nan"))
    if spec.PROBS:
        mass = sums.mass
        hard = mass * log_sum - (sums.dot + mass * down)
    value = hard
    slope, uniform, at_label = mass, 0.0, 1.0
    if spec.SMOOTH:
        count = tl.maximum(sums.count, 1.0)
        smooth = log_sum - (sums.total + sums.count * down) / count
        # Smoothed away altogether, a masked label's infinity must not come back as 0 * inf.
        value = tl.where(smoothing == 1.0, 0.0, (1.0 - smoothing) * hard) + smoothing * smooth
        slope, uniform, at_label = (1.0 - smoothing) * mass + smoothing, c.ce * smoothing / count, 1.0 - smoothing
    counts = (c.ce != 0.0) & (softmax_tau1.sum_exp != 0.0)
    has_z_loss = (c.z_weight != 0.0) & (softmax_tau1.sum_exp != 0.0)
    slope = tl.where(counts, c.ce * slope, 0.0) + tl.where(has_z_loss, 2.0 * c.z_weight * lse, 0.0)
    return softmax_tau1, TargetTerms(
        tl.where(dead, 0.0, value),
        tl.where(dead, 0.0, lse),
        slope,
        tl.where(counts, uniform, 0.0),
        tl.where(counts, c.ce * at_label, 0.0),
    )


@triton.jit
def known_cross_entropy(terms, label, spec):
    """The cross-entropy for a log: 0 where the row has no target to compute one with."""
    ce = terms.ce
    if spec.LABELS:
        ce = tl.where(label.found, ce, 0.0)
    elif not spec.PROBS:
        ce = 0.0
    return ce


@triton.jit
def target_gradient(softmax_tau1, terms, label, loss):
    """The gradient, relative to the whole row's origin; ``loss`` is the row's."""
    empty = softmax_tau1.sum_exp == 0.0
    slope = tl.where(empty, 0.0, terms.slope / tl.where(empty, 1.0, softmax_tau1.sum_exp))
    poison = tl.where(loss != loss, float("nan"), 0.0)
    return TargetGradient(slope, terms.uniform, terms.label, label.column, -terms.label, poison)


@triton.jit
def at_left_out_label(gradient, softmax_tau1, logit):
    """What the label's column gets where the sweeps left it out, with no exponential to multiply by the slope."""
    return gradient.at_column + gradient.slope * tl.exp2((logit - origin_of(softmax_tau1.row_max)) * LOG2E)


@triton.jit
def with_origin(gradient, softmax_tau1, row_max, at_column):
    """The gradient, made relative to the origin of the columns that both sides have."""
    g, down = gradient, tl.exp2((origin_of(row_max) - origin_of(softmax_tau1.row_max)) * LOG2E)
    return TargetGradient(g.slope * down, g.uniform, g.probs, g.column, at_column, g.poison)
