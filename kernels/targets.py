"""Ground truth: cross-entropy with labels or class probabilities, smoothing and z-loss, at temperature 1."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LOG2E
from kdfast.kernels.rows import columns_of_tile, load_labels
from kdfast.kernels.softmax import Softmax, merge, origin_of

__all__ = ["Labelled", "Truth", "add_labelled", "label_of", "labelled_over_groups", "slopes_of", "softmax_beyond"]
__all__ += ["truth_of"]


class Labelled(NamedTuple):
    """What smoothing and class probabilities need: logits relative to the student's origin."""

    count: tl.tensor  # finite columns
    total: tl.tensor  # sum of their logits
    mass: tl.tensor  # sum y
    dot: tl.tensor  # sum y x


class Truth(NamedTuple):
    """The terms' values, and d(loss) / d(logit) = slope * q - share - label * y."""

    ce: tl.tensor
    lse: tl.tensor
    slope: tl.tensor
    share: tl.tensor
    label: tl.tensor


@triton.jit
def label_of(label, row, student, columns, counts):
    """(column, its logit, whether it is one of the row's): -1 and -inf where not, and nothing is read."""
    column = tl.load(label + row)
    inside = (column >= 0) & (column < columns)
    column = tl.where(inside, column, -1).to(tl.int32)
    return column, tl.load(student + column, mask=inside & counts, other=-INF).to(tl.float32), inside


@triton.jit
def add_labelled(sums, raw, y, down, origin, SMOOTH: tl.constexpr, PROBS: tl.constexpr):
    """One more tile; its origin lies `down` from that of the sums."""
    count, total, mass, dot = sums.count, sums.total, sums.mass, sums.dot
    x = raw - origin[:, None]
    if SMOOTH:
        live = raw > -INF
        total += count * down + tl.sum(tl.where(live, x, 0.0), 1)
        count += tl.sum(tl.where(live, 1.0, 0.0), 1)
    if PROBS:
        dot += mass * down + tl.sum(tl.where(y == 0.0, 0.0, y * x), 1)
        mass += tl.sum(y, 1)
    return Labelled(count, total, mass, dot)


@triton.jit
def labelled_over_groups(sums, origins, origin):
    down = origins - origin
    return Labelled(
        tl.sum(sums.count, 0),
        tl.sum(sums.total + sums.count * down, 0),
        tl.sum(sums.mass, 0),
        tl.sum(sums.dot + sums.mass * down, 0),
    )


@triton.jit
def _add_beyond(softmax, labelled, at, start, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    column = start + columns_of_tile(BLOCK, WIDTH)
    x = tl.load(at.student + column, mask=column < at.bound, other=-INF).to(tl.float32)
    tile = Softmax(tl.max(tl.max(x, 1), 0), 1.0)
    top = tl.maximum(softmax.top, tile.top)
    origin, down = origin_of(top), origin_of(softmax.top) - origin_of(top)
    z = softmax.z * tl.exp2((softmax.top - origin) * LOG2E)
    z += tl.sum(tl.sum(tl.exp2((x - origin) * LOG2E), 1), 0)
    count, total, mass, dot = labelled.count, labelled.total, labelled.mass, labelled.dot
    live = x > -INF
    if SMOOTH:
        total += count * down + tl.sum(tl.sum(tl.where(live, x - origin, 0.0), 1), 0)
        count += tl.sum(tl.sum(tl.where(live, 1.0, 0.0), 1), 0)
    if at.probs is not None:
        y = load_labels(at, column)
        dot += mass * down + tl.sum(tl.sum(tl.where(y == 0.0, 0.0, y * (x - origin)), 1), 0)
        mass += tl.sum(tl.sum(y, 1), 0)
    return Softmax(top, z), Labelled(count, total, mass, dot)


@triton.jit
def softmax_beyond(softmax, labelled, at, first, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Adds the columns from `first` on, which only the student has: they count for the ground truth alone."""
    for start in range(first, at.bound, BLOCK):
        softmax, labelled = _add_beyond(softmax, labelled, at, start, SMOOTH, BLOCK, WIDTH)
    return softmax, labelled


@triton.jit
def _finished(
    softmax, labelled, origin, x_label, has_label, ce, z, smoothing, SMOOTH: tl.constexpr, PROBS: tl.constexpr
):
    """The finished terms, without their coefficients; `origin` is the one that `labelled` is relative to."""
    dead = softmax.z == 0.0
    top, log_z = origin_of(softmax.top), tl.log(tl.where(dead, 1.0, softmax.z))
    down = origin - top
    lse = top + log_z
    mass, hard = 1.0, tl.where(has_label, (top - x_label) + log_z, float("nan"))
    if PROBS:
        mass = labelled.mass
        hard = mass * log_z - (labelled.dot + mass * down)
    value = hard
    slope, share, label = mass, 0.0, 1.0
    if SMOOTH:
        count = tl.maximum(labelled.count, 1.0)
        smooth = log_z - (labelled.total + labelled.count * down) / count
        # Smoothed away altogether, a masked label's infinity must not come back as 0 * inf.
        value = tl.where(smoothing == 1.0, 0.0, (1.0 - smoothing) * hard) + smoothing * smooth
        slope, share, label = (1.0 - smoothing) * mass + smoothing, ce * smoothing / count, 1.0 - smoothing
    counts = (ce != 0.0) & (softmax.z != 0.0)
    slope = tl.where(counts, ce * slope, 0.0) + tl.where((z != 0.0) & (softmax.z != 0.0), 2.0 * z * lse, 0.0)
    return Truth(
        tl.where(dead, 0.0, value),
        tl.where(dead, 0.0, lse),
        slope,
        tl.where(counts, share, 0.0),
        tl.where(counts, ce * label, 0.0),
    )


@triton.jit
def truth_of(one, labelled, probs, apart, c, x_label, has_label, smoothing, SMOOTH: tl.constexpr):
    """(the softmax at temperature 1 over the student's whole row, Truth), with the columns that were kept apart."""
    origin = origin_of(one.top)
    one = merge(one, apart, LOG2E)
    return one, _finished(one, labelled, origin, x_label, has_label, c.ce, c.z, smoothing, SMOOTH, probs is not None)


@triton.jit
def slopes_of(one, truth, x_label, APART: tl.constexpr):
    """(the slope per exponential at the whole row's origin, what the label's column gets beside)."""
    slope = tl.where(one.z == 0.0, 0.0, truth.slope / tl.where(one.z == 0.0, 1.0, one.z))
    at_column = -truth.label
    if APART:
        # Left out of the sweeps, the label has its softmax here.
        at_column += slope * tl.exp2((x_label - origin_of(one.top)) * LOG2E)
    return slope, at_column
