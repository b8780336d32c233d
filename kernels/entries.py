"""A sparse row's (id, weight) entries: taken out of the sweeps by a bit per column, and added from loops of their own.

The tail's log-sum-exp is exact however small its mass, since no entry ever was in it. Ids may come in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, LOG2E, element, sum_of_values
from kdfast.kernels.statistics import at_one, origin_of

__all__ = [
    "Entries",
    "EntryLink",
    "EntryWeights",
    "best_entry",
    "entries_of",
    "entry_gradient",
    "entry_sums",
    "entry_values",
    "mark",
    "unmark",
]


class Entries(NamedTuple):
    ids: tl.tensor
    weights: tl.tensor
    student: tl.tensor  # the row whose columns the ids are
    marks: tl.tensor
    count: tl.tensor
    shared: tl.tensor  # ids are below it
    target: tl.tensor  # dkd's, which is none of them; -1: none


class EntrySums(NamedTuple):
    top: tl.tensor
    z: tl.tensor
    z_one: tl.tensor
    mass: tl.tensor
    target: tl.tensor  # the weight of dkd's target
    has_target: tl.tensor


class EntryLink(NamedTuple):
    """What makes logits log-probabilities over the row, and weights probabilities."""

    origin: tl.tensor
    bits: tl.tensor
    log_z: tl.tensor
    mass: tl.tensor


class EntryWeights(NamedTuple):
    """The divergence's gradient at an entry: kd (student q - teacher p), or kd times h less its mean."""

    kd: tl.tensor
    student: tl.tensor
    teacher: tl.tensor
    mean: tl.tensor


@triton.jit
def entries_of(ids, weights, offsets, row, total, student, marks, shared, target, wanted):
    """(a row's entries, whether its offsets are those of one): nothing outside the entries is ever read."""
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    good = (begin >= 0) & (begin <= end) & (end <= total)
    begin = tl.where(good, begin, 0)
    count = tl.where(good & wanted, end - begin, 0).to(tl.int32)
    return Entries(ids + begin, weights + begin, student, marks, count, shared, target), good


@triton.jit
def _ids(e, start, ENTRIES: tl.constexpr):
    """(their numbers, ids, which are entries, which of these have a column)."""
    at = start + tl.arange(0, ENTRIES)
    inside = at < e.count
    column = tl.load(e.ids + at, mask=inside, other=0)
    return at, column, inside, inside & (column >= 0) & (column < e.shared)


@triton.jit
def _load(e, start, ENTRIES: tl.constexpr):
    """(ids, logits, weights, which of them count, which is the target): -inf and 0 where there is none."""
    at, column, _, good = _ids(e, start, ENTRIES)
    counts = good & (column != e.target)
    x = tl.load(e.student + column, mask=counts, other=-INF).to(tl.float32)
    return column, x, tl.load(e.weights + at, mask=good, other=0.0), counts, good & (column == e.target)


@triton.jit
def mark(e, ENTRIES: tl.constexpr):
    """Sets the columns' bits; whether an id is out of range, which touches no memory."""
    bad = tl.zeros([ENTRIES], tl.int32)
    for start in range(0, e.count, ENTRIES):
        _, column, inside, good = _ids(e, start, ENTRIES)
        bad += tl.where(inside, 1, 0) - tl.where(good, 1, 0)
        bit = tl.full([ENTRIES], 1, tl.int32) << (column % 32)
        tl.atomic_or(e.marks + column // 32, bit, mask=good, sem="relaxed")
    tl.debug_barrier()
    return tl.max(bad, 0) > 0


@triton.jit
def unmark(e, ENTRIES: tl.constexpr):
    """Clears them again, so that the next row finds none."""
    tl.debug_barrier()
    for start in range(0, e.count, ENTRIES):
        _, column, _, good = _ids(e, start, ENTRIES)
        tl.store(e.marks + column // 32, tl.zeros([ENTRIES], tl.int32), mask=good)
    tl.debug_barrier()


@triton.jit
def entry_sums(e, scale, ENTRIES: tl.constexpr):
    """The entries' softmax and weights, dkd's target apart."""
    zero, top = tl.zeros([ENTRIES], tl.float32), tl.full([ENTRIES], -INF, tl.float32)
    z, one, mass, at_target, has_target = zero, zero, zero, zero, zero
    for start in range(0, e.count, ENTRIES):
        _, x, w, counts, is_target = _load(e, start, ENTRIES)
        raised = tl.maximum(top, x)
        origin = origin_of(raised)
        factor = tl.exp2((top - origin) * scale.student)
        added = tl.exp2((x - origin) * scale.student)
        one = one * at_one(factor, top - origin, scale) + at_one(added, x - origin, scale)
        z = z * factor + added
        top = raised
        mass += tl.where(counts, w, 0.0)
        at_target += tl.where(is_target, w, 0.0)
        has_target += tl.where(is_target, 1.0, 0.0)
    highest = tl.max(top, 0)
    down = top - origin_of(highest)
    factor = tl.exp2(down * scale.student)
    one = tl.sum(one * at_one(factor, down, scale), 0)
    z, mass, at_target = tl.sum(z * factor, 0), tl.sum(mass, 0), tl.sum(at_target, 0)
    return EntrySums(highest, z, one, mass, at_target, tl.max(has_target, 0) > 0.0)


@triton.jit
def _logs(x, w, link):
    """(q, p, log q, log p)."""
    log_q = (x - link.origin) * link.bits * LN2 - link.log_z
    p = w / link.mass
    # A weight of 0 has no logarithm to take.
    return tl.exp(log_q), p, log_q, tl.where(p == 0.0, -INF, tl.log(tl.where(p == 0.0, 1.0, p)))


@triton.jit
def entry_values(e, link, by, KIND: tl.constexpr, FAMILY: tl.constexpr, CASE: tl.constexpr, ENTRIES: tl.constexpr):
    """(sum of the values, sum of h, sum of q where the teacher is alive) over the entries.

    For the reverse family h is q times the gap where there is one, of the sign that the value has.
    """
    zero = tl.zeros([ENTRIES], tl.float32)
    values, slopes, both, infinite = zero, zero, zero, zero
    for start in range(0, e.count, ENTRIES):
        _, x, w, counts, _ = _load(e, start, ENTRIES)
        q, p, log_q, log_p = _logs(x, w, link)
        if FAMILY == "element":
            value, h = element(p, q, log_p - log_q, log_p, log_q, by, KIND, CASE)
            slopes += tl.where(counts, h, 0.0)
        else:
            value = tl.where(p == 0.0, 0.0, p * (-log_q if KIND == "soft_ce" else log_p - log_q))
            if FAMILY == "reverse":
                h = tl.where(counts & (p != 0.0) & (x != -INF), q * (log_q - log_p), 0.0)
                slopes += h
                both += tl.where(counts & (p != 0.0), q, 0.0)
                infinite += tl.where(counts & (p == 0.0) & (x > -INF), 1.0, 0.0)
                value = 0.5 * (value + h) if KIND == "symmetric_kl" else h
        values += tl.where(counts, value, 0.0)
    slopes = tl.sum(slopes, 0)
    values = sum_of_values(tl.sum(values, 0), slopes, KIND)
    return tl.where(tl.max(infinite, 0) > 0.0, INF, values), slopes, tl.sum(both, 0)


@triton.jit
def _entry_kd(q, p, log_q, log_p, x, weights, by, KIND: tl.constexpr, FAMILY: tl.constexpr, CASE: tl.constexpr):
    if FAMILY == "forward":
        g = weights.student * q - weights.teacher * p
    elif FAMILY == "reverse":
        g = q * (tl.where((p != 0.0) & (x != -INF), log_q - log_p, 0.0) - weights.mean)
        if KIND == "symmetric_kl":
            g = 0.5 * (g + (q - p))
    else:
        _, h = element(p, q, log_p - log_q, log_p, log_q, by, KIND, CASE)
        g = h - q * weights.mean
    return tl.where(weights.kd == 0.0, 0.0, weights.kd * g)


@triton.jit
def entry_gradient(
    to,
    probs,
    e,
    link,
    weights,
    one_top,
    ground,
    by,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    LABELS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Writes the entries' gradient; the sweep before it has left their logits where they are read from."""
    tl.debug_barrier()
    for start in range(0, e.count, ENTRIES):
        column, x, w, counts, _ = _load(e, start, ENTRIES)
        q, p, log_q, log_p = _logs(x, w, link)
        g = _entry_kd(q, p, log_q, log_p, x, weights, by, KIND, FAMILY, CASE)
        g += ground.slope * tl.exp2((x - origin_of(one_top)) * LOG2E) - ground.share
        if LABELS:
            g += tl.where(column == ground.column, ground.at_column, 0.0)
        if probs is not None:
            g -= ground.probs * tl.load(probs + column, mask=counts, other=0.0).to(tl.float32)
        g = tl.where(x == -INF, 0.0, g) + ground.poison
        tl.store(to + column, g.to(to.dtype.element_ty), mask=counts)


@triton.jit
def best_entry(e, ENTRIES: tl.constexpr):
    """(the largest weight, its id): the first of equal ones; -1 and -1 where there is none."""
    value, number = tl.full([ENTRIES], -1.0, tl.float32), tl.full([ENTRIES], 2147483647, tl.int32)
    best_id = tl.full([ENTRIES], -1, tl.int32)
    for start in range(0, e.count, ENTRIES):
        at, column, _, good = _ids(e, start, ENTRIES)
        w = tl.load(e.weights + at, mask=good, other=-1.0)
        wins = w > value
        value, number = tl.where(wins, w, value), tl.where(wins, at, number)
        best_id = tl.where(wins, column, best_id)
    best = tl.max(value, 0)
    first = tl.min(tl.where(value == best, number, 2147483647), 0)
    return best, tl.max(tl.where((value == best) & (number == first), best_id, -1), 0)
