"""A row: where it lies, its tiles, what ``coef`` says of it, and where its results go.

A tile is (groups, WIDTH): one thread holds whole groups, so that a sweep adds up per group without asking its
neighbours, and they meet once per row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LOG2E, log2_or_lowest

__all__ = ["Coefficients", "Row", "Tile", "coefficients", "columns_of_tile", "load_labels", "load_row", "load_tile"]
__all__ += ["row_offset", "store_parts", "teacher_side", "total"]


class Row(NamedTuple):
    """Where a row lies, and how much of it is read: a bound of 0 costs nothing."""

    student: tl.tensor
    teacher: tl.tensor  # logits, or a row of a table of shapes
    probs: tl.tensor  # class probabilities as labels
    marks: tl.tensor  # a bit per column: entries, which are taken out of the sweeps
    bound: tl.tensor  # columns of the student
    bound_t: tl.tensor  # of the teacher
    target: tl.tensor  # dkd's, taken out too
    held: tl.tensor = None  # all tiles, where the row stays in the registers


class Tile(NamedTuple):
    raw: tl.tensor  # the student's logits, -inf outside the bound
    x: tl.tensor  # and where the column is taken
    y: tl.tensor  # the teacher's logits likewise; of a shape, 0 there
    taken: tl.tensor


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def columns_of_tile(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _marked(marks, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    first = start + tl.arange(0, BLOCK // WIDTH) * WIDTH
    # Past the first-level cache, which does not know what the atomics before the sweep did.
    word = tl.load(marks + first // 32, cache_modifier=".cg")
    return ((word >> (first % 32))[:, None] >> tl.arange(0, WIDTH)[None, :]) & 1 != 0


@triton.jit
def load_tile(at, start, KIND: tl.constexpr, TEACHER: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    column = start + columns_of_tile(BLOCK, WIDTH)
    raw = tl.load(at.student + column, mask=column < at.bound, other=-INF).to(tl.float32)
    x, y, taken = raw, raw, False
    if TEACHER != "none":
        y = tl.load(at.teacher + column, mask=column < at.bound_t, other=-INF if TEACHER == "logits" else 0.0)
        y = y.to(tl.float32)
    if at.marks is not None or KIND == "dkd":
        taken = column == at.target if KIND == "dkd" else column < 0
        if at.marks is not None:
            taken = taken | _marked(at.marks, start, BLOCK, WIDTH)
        x = tl.where(taken, -INF, raw)
        y = tl.where(taken, -INF if TEACHER == "logits" else 0.0, y)
    return Tile(raw, x, y, taken)


@triton.jit
def load_row(at, KIND: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """All tiles of both sides' logits. Of several, each is worked on before the next: one large one would spill."""
    tiles = ()
    for i in tl.static_range(HELD):
        tiles += (load_tile(at, i * BLOCK, KIND, "logits", BLOCK, WIDTH),)  # type: ignore[assignment]
    return tiles


@triton.jit
def teacher_side(y, origin, bits, KIND: tl.constexpr, TEACHER: tl.constexpr):
    """(log2 of the exponentials, the exponentials): a shape's row stands for exponentials whose origin is 0."""
    if TEACHER == "logits":
        v = (y - origin) * bits
        e = tl.exp2(v)
    else:
        # Cross-entropy only asks whether it is finite.
        v = tl.where(y == 0.0, -INF, 0.0) if KIND == "soft_ce" else log2_or_lowest(y)
        e = y
    return v, e


@triton.jit
def load_labels(at, column):
    return tl.load(at.probs + column, mask=column < at.bound, other=0.0).to(tl.float32)


class Coefficients(NamedTuple):
    tau_s: tl.tensor  # 1 where it is no temperature
    tau_t: tl.tensor
    kd: tl.tensor
    ce: tl.tensor
    z: tl.tensor
    counts: tl.tensor  # some coefficient is not 0
    is_bad: tl.tensor  # a temperature is not positive and finite
    bits: tl.tensor  # log2(e) / the student's temperature, whatever that is


@triton.jit
def coefficients(coef, row, rows, TEACHER_TAU: tl.constexpr, LABELLED: tl.constexpr):
    """Of a row; without labels there is no cross-entropy, and labels of their own temperature have tau_t = 1."""
    tau_s, kd, z = tl.load(coef + row), tl.load(coef + 2 * rows + row), tl.load(coef + 4 * rows + row)
    tau_t, ce = 1.0, tl.load(coef + 3 * rows + row)
    good = (tau_s > 0.0) & (tau_s < INF)
    if TEACHER_TAU:
        tau_t = tl.load(coef + rows + row)
        good = good & (tau_t > 0.0) & (tau_t < INF)
        tau_t = tl.where(good, tau_t, 1.0)
    counts = (kd != 0.0) | (ce != 0.0) | (z != 0.0)
    if not LABELLED:
        ce = ce * 0.0
    return Coefficients(tl.where(good, tau_s, 1.0), tau_t, kd, ce, z, counts, good == 0, LOG2E / tau_s)


@triton.jit
def total(c, kd, truth):
    """The row's loss: terms whose coefficient is 0 are 0, whatever they are."""
    loss = tl.where(c.kd != 0.0, c.kd * kd, 0.0) + tl.where(c.ce != 0.0, c.ce * truth.ce, 0.0)
    return loss + tl.where(c.z != 0.0, c.z * truth.lse * truth.lse, 0.0)


@triton.jit
def store_parts(parts, row, rows, counts, kd, ce, entropy, agree):
    """Of a row that counts; 0 elsewhere. Without a label of the row there is no cross-entropy to tell."""
    tl.store(parts + row, tl.where(counts, kd, 0.0))
    tl.store(parts + rows + row, tl.where(counts, ce, 0.0))
    tl.store(parts + 2 * rows + row, tl.where(counts, entropy, 0.0))
    tl.store(parts + 3 * rows + row, tl.where(counts & agree, 1.0, 0.0))
