"""What ``coef`` says of a row, and the row's result."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LOG2E

__all__ = ["Coefficients", "coefficients", "label_of", "store_parts", "total"]


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
def label_of(label, row, student, columns, counts):
    """(column, its logit, whether it is one of the row's): -1 and -inf where not, and nothing is read."""
    column = tl.load(label + row)
    inside = (column >= 0) & (column < columns)
    column = tl.where(inside, column, -1).to(tl.int32)
    return column, tl.load(student + column, mask=inside & counts, other=-INF).to(tl.float32), inside


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
