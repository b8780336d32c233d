"""A row of a row op: where it lies, its tiles, the coefficients of its terms, and its loss.

A tile is (groups, WIDTH) columns: one thread holds whole groups, so that a sweep adds up within a group without
exchanging anything between threads, and the groups are merged once per row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.rowmath import INF, LOG2E, log2_or_lowest

__all__ = ["Coefficients", "Results", "Row", "Sizes", "Spec", "StridedRows", "Tile", "coefficients", "load_probs"]
__all__ += ["load_row", "load_tile", "loss_of", "per_group", "row_pointer", "strided", "teacher_side", "tile_columns"]
__all__ += ["with_bounds"]


class Spec(NamedTuple):
    """What a row op's kernel is compiled for: every field is a ``tl.constexpr``."""

    KIND: tl.constexpr  # the divergence's name
    FAMILY: tl.constexpr  # how it is computed from a row: kdfast.kernels.rowmath.family_of
    CASE: tl.constexpr  # the special case of its formula: kdfast.kernels.rowmath.case_of
    TEACHER: tl.constexpr  # what a row has of the teacher: "logits", a "prototype" of probabilities, or "none"
    STANDARDIZE: tl.constexpr  # compare z-scores of the logits
    LABELS: tl.constexpr  # targets are labels
    PROBS: tl.constexpr  # or class probabilities
    SMOOTH: tl.constexpr  # and are smoothed
    BLOCK: tl.constexpr  # columns of a tile
    WIDTH: tl.constexpr  # columns that a thread loads at once
    TILES_ON_CHIP: tl.constexpr  # tiles that hold a whole row in the registers, read once; 0: rows are swept twice
    ENTRIES: tl.constexpr  # entries of a sparse row that a loop takes at once; 0: rows have none


class Sizes(NamedTuple):
    """How many rows there are, and how wide they are."""

    rows: tl.tensor
    inner: tl.tensor  # rows are (outer, inner)
    columns: tl.tensor  # the student's vocabulary
    shared: tl.tensor  # its columns that the teacher has, too: the first ones


class StridedRows(NamedTuple):
    """An (outer, inner, vocabulary) tensor of unit stride along the vocabulary."""

    data: tl.tensor
    outer_stride: tl.tensor
    inner_stride: tl.tensor


class Results(NamedTuple):
    """Where a kernel's results go."""

    loss: tl.tensor  # (rows,)
    parts: tl.tensor  # (4, rows): divergence, cross-entropy, entropy and agreement; None: nobody wants them


class Row(NamedTuple):
    """One row's pointers, and how much of it is read: a bound of 0 costs nothing.

    What the Spec says that a row lacks is the student's pointer again, and is not read.
    """

    student: tl.tensor
    teacher: tl.tensor  # logits, or the row's prototype
    probs: tl.tensor  # class probabilities as targets
    marks: tl.tensor  # a bit per column that is set for entries, which the sweeps leave out
    bound: tl.tensor  # columns of the student that are read
    bound_t: tl.tensor  # of the teacher
    excluded: tl.tensor  # dkd's target, which the sweeps leave out as well


class Tile(NamedTuple):
    """The logits of a tile in float32."""

    raw: tl.tensor  # the student's, -inf outside the bound
    x: tl.tensor  # and where the column is left out
    y: tl.tensor  # the teacher's likewise; of a prototype, 0 there
    left_out: tl.tensor


def strided(x: Tensor | None) -> StridedRows | None:
    """The rows of (outer, inner, vocabulary) as a kernel's argument."""
    return None if x is None else StridedRows(x, *x.stride()[:2])


@triton.jit
def row_pointer(rows, row_id, inner):
    return rows.data + (row_id // inner * rows.outer_stride + row_id % inner * rows.inner_stride)


@triton.jit
def with_bounds(row, bound, bound_t):
    """The row with other bounds of what is read."""
    return Row(row.student, row.teacher, row.probs, row.marks, bound, bound_t, row.excluded)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_columns(start, spec):
    """The (groups, WIDTH) column numbers of the tile that begins at ``start``."""
    groups = tl.arange(0, spec.BLOCK // spec.WIDTH)[:, None] * spec.WIDTH
    return (groups + tl.arange(0, spec.WIDTH)[None, :]) + start


@triton.jit
def per_group(value, spec):
    """(groups,) numbers to start a sweep with."""
    return tl.full([spec.BLOCK // spec.WIDTH], value, tl.float32)


@triton.jit
def _marked(marks, start, spec):
    first = start + tl.arange(0, spec.BLOCK // spec.WIDTH) * spec.WIDTH
    # Past the first-level cache, which does not know what the atomics before the sweep did.
    word = tl.load(marks + first // 32, cache_modifier=".cg")
    return ((word >> (first % 32))[:, None] >> tl.arange(0, spec.WIDTH)[None, :]) & 1 != 0


@triton.jit
def load_tile(row, start, spec):
    """The tile that begins at ``start``."""
    column = tile_columns(start, spec)
    raw = tl.load(row.student + column, mask=column < row.bound, other=-INF).to(tl.float32)
    x, y, left_out = raw, raw, False
    if spec.TEACHER != "none":
        y = tl.load(row.teacher + column, mask=column < row.bound_t, other=-INF if spec.TEACHER == "logits" else 0.0)
        y = y.to(tl.float32)
    if spec.ENTRIES > 0 or spec.KIND == "dkd":
        left_out = column == row.excluded if spec.KIND == "dkd" else column < 0
        if spec.ENTRIES > 0:
            left_out = left_out | _marked(row.marks, start, spec)
        x = tl.where(left_out, -INF, raw)
        y = tl.where(left_out, -INF if spec.TEACHER == "logits" else 0.0, y)
    return Tile(raw, x, y, left_out)


@triton.jit
def load_row(row, spec):
    """All tiles of a row. Of several, each is worked on before the next: one large tile would spill registers."""
    tiles = ()
    for i in tl.static_range(spec.TILES_ON_CHIP):
        tiles += (load_tile(row, i * spec.BLOCK, spec),)  # type: ignore[assignment]
    return tiles


@triton.jit
def teacher_side(y, origin, scale_log2, spec):
    """(log2 of the teacher's exponentials, the exponentials).

    A prototype's probabilities stand for exponentials, whose origin is 0.
    """
    if spec.TEACHER == "logits":
        v = (y - origin) * scale_log2
        e = tl.exp2(v)
    else:
        # Cross-entropy only asks whether it is finite.
        v = tl.where(y == 0.0, -INF, 0.0) if spec.KIND == "soft_ce" else log2_or_lowest(y)
        e = y
    return v, e


@triton.jit
def load_probs(row, column):
    """The targets' class probabilities."""
    return tl.load(row.probs + column, mask=column < row.bound, other=0.0).to(tl.float32)


# ---- what coef says of a row -----------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """A row's column of ``coef``."""

    tau_s: tl.tensor  # 1 where it is no temperature
    tau_t: tl.tensor
    kd: tl.tensor
    ce: tl.tensor
    z_weight: tl.tensor  # of the z-loss
    counts: tl.tensor  # some coefficient is not 0
    is_bad: tl.tensor  # a temperature is not positive and finite
    scale_log2: tl.tensor  # log2(e) / the student's temperature, whatever that is


@triton.jit
def coefficients(coef, row_id, rows, spec):
    """A row's Coefficients. Without targets there is no cross-entropy; cached labels have the teacher's temperature in
    them, and no tau_t.
    """
    tau_s, kd, z_weight = tl.load(coef + row_id), tl.load(coef + 2 * rows + row_id), tl.load(coef + 4 * rows + row_id)
    tau_t, ce = 1.0, tl.load(coef + 3 * rows + row_id)
    good = (tau_s > 0.0) & (tau_s < INF)
    if spec.TEACHER == "logits":
        tau_t = tl.load(coef + rows + row_id)
        good = good & (tau_t > 0.0) & (tau_t < INF)
        tau_t = tl.where(good, tau_t, 1.0)
    counts = (kd != 0.0) | (ce != 0.0) | (z_weight != 0.0)
    if not (spec.LABELS or spec.PROBS):
        ce = ce * 0.0
    return Coefficients(tl.where(good, tau_s, 1.0), tau_t, kd, ce, z_weight, counts, good == 0, LOG2E / tau_s)


@triton.jit
def loss_of(c, kd, terms):
    """The row's loss: a term whose coefficient is 0 is 0, whatever its value."""
    loss = tl.where(c.kd != 0.0, c.kd * kd, 0.0) + tl.where(c.ce != 0.0, c.ce * terms.ce, 0.0)
    return loss + tl.where(c.z_weight != 0.0, c.z_weight * terms.lse * terms.lse, 0.0)
