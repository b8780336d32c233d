"""A sparse row's (id, weight) entries: taken out of the sweeps by a bit per column, and added from loops of their own.

The tail's log-sum-exp is exact however small its mass, since no entry ever was in it. Ids may come in any order. An
entry of weight 0 is padding: whatever its id, it is as if it were not there.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, LOG2E, element, sum_of_values
from kdfast.kernels.softmax import exp_tau1, origin_of

__all__ = ["Entries", "EntryLists", "EntryStats", "EntrySums", "EntryWeights", "argmax_of_entries", "entries_of"]
__all__ += ["entry_gradient", "entry_sums", "entry_values", "mark", "unmark"]


class EntryLists(NamedTuple):
    """A kernel's argument: the entries of all rows, one row's after another's."""

    ids: tl.tensor  # (count,) int32
    weights: tl.tensor  # (count,) float32
    offsets: tl.tensor  # (rows + 1,) int64: where each row's begin
    count: tl.tensor


class Entries(NamedTuple):
    """One row's entries."""

    ids: tl.tensor
    weights: tl.tensor
    logits: tl.tensor  # the student's row, whose columns the ids are
    marks: tl.tensor  # a bit per column
    count: tl.tensor
    shared: tl.tensor  # ids are below it
    target: tl.tensor  # dkd's, which is none of them; -1: none


class EntrySums(NamedTuple):
    """Sums over a row's entries, dkd's target apart."""

    row_max: tl.tensor
    sum_exp: tl.tensor
    sum_exp_tau1: tl.tensor
    mass: tl.tensor  # of the weights
    target: tl.tensor  # the weight of dkd's target
    has_target: tl.tensor


class EntryStats(NamedTuple):
    """What makes logits log-probabilities over the row, and weights probabilities."""

    origin: tl.tensor
    scale_log2: tl.tensor
    log_sum_exp: tl.tensor
    mass: tl.tensor


class EntryWeights(NamedTuple):
    """The divergence's gradient at an entry: kd (student q - teacher p), or kd times h less its mean."""

    kd: tl.tensor
    student: tl.tensor
    teacher: tl.tensor
    mean: tl.tensor


@triton.jit
def entries_of(lists, row_id, logits, marks, shared, target, wanted):
    """(a row's entries, whether its offsets are those of one): nothing outside the lists is ever read."""
    begin, end = tl.load(lists.offsets + row_id), tl.load(lists.offsets + row_id + 1)
    good = (begin >= 0) & (begin <= end) & (end <= lists.count)
    begin = tl.where(good, begin, 0)
    count = tl.where(good & wanted, end - begin, 0).to(tl.int32)
    return Entries(lists.ids + begin, lists.weights + begin, logits, marks, count, shared, target), good


@triton.jit
def _listed(entries, start, spec):
    """(their numbers, ids, weights, which are entries, which of these have a column)."""
    at = start + tl.arange(0, spec.ENTRIES)
    w = tl.load(entries.weights + at, mask=at < entries.count, other=0.0)
    inside = w != 0.0
    column = tl.load(entries.ids + at, mask=inside, other=0)
    return at, column, w, inside, inside & (column >= 0) & (column < entries.shared)


@triton.jit
def _load(entries, start, spec):
    """(ids, logits, weights, which of them count, which is the target): -inf and 0 where there is none."""
    _, column, w, _, good = _listed(entries, start, spec)
    counts = good & (column != entries.target)
    x = tl.load(entries.logits + column, mask=counts, other=-INF).to(tl.float32)
    return column, x, tl.where(good, w, 0.0), counts, good & (column == entries.target)


# ---- the sweeps' bits ------------------------------------------------------------------------------------------------


@triton.jit
def mark(entries, spec):
    """Sets the columns' bits; whether an id is out of range, which touches no memory."""
    bad = tl.zeros([spec.ENTRIES], tl.int32)
    for start in range(0, entries.count, spec.ENTRIES):
        _, column, _, inside, good = _listed(entries, start, spec)
        bad += tl.where(inside, 1, 0) - tl.where(good, 1, 0)
        bit = tl.full([spec.ENTRIES], 1, tl.int32) << (column % 32)
        tl.atomic_or(entries.marks + column // 32, bit, mask=good, sem="relaxed")
    tl.debug_barrier()
    return tl.max(bad, 0) > 0


@triton.jit
def unmark(entries, spec):
    """Clears them again, so that the next row finds none."""
    tl.debug_barrier()
    for start in range(0, entries.count, spec.ENTRIES):
        _, column, _, _, good = _listed(entries, start, spec)
        tl.store(entries.marks + column // 32, tl.zeros([spec.ENTRIES], tl.int32), mask=good)
    tl.debug_barrier()


# ---- sums and values -------------------------------------------------------------------------------------------------


@triton.jit
def entry_sums(entries, tau, spec):
    """The entries' softmax and weights, dkd's target apart."""
    zero, row_max = tl.zeros([spec.ENTRIES], tl.float32), tl.full([spec.ENTRIES], -INF, tl.float32)
    sum_exp, sum_exp_tau1, mass, at_target, has_target = zero, zero, zero, zero, zero
    for start in range(0, entries.count, spec.ENTRIES):
        _, x, w, counts, is_target = _load(entries, start, spec)
        raised = tl.maximum(row_max, x)
        origin = origin_of(raised)
        factor = tl.exp2((row_max - origin) * tau.scale_log2_s)
        added = tl.exp2((x - origin) * tau.scale_log2_s)
        sum_exp_tau1 = sum_exp_tau1 * exp_tau1(factor, row_max - origin, tau) + exp_tau1(added, x - origin, tau)
        sum_exp = sum_exp * factor + added
        row_max = raised
        mass += tl.where(counts, w, 0.0)
        at_target += tl.where(is_target, w, 0.0)
        has_target += tl.where(is_target, 1.0, 0.0)
    highest = tl.max(row_max, 0)
    down = row_max - origin_of(highest)
    factor = tl.exp2(down * tau.scale_log2_s)
    sum_exp_tau1 = tl.sum(sum_exp_tau1 * exp_tau1(factor, down, tau), 0)
    sum_exp, mass, at_target = tl.sum(sum_exp * factor, 0), tl.sum(mass, 0), tl.sum(at_target, 0)
    return EntrySums(highest, sum_exp, sum_exp_tau1, mass, at_target, tl.max(has_target, 0) > 0.0)


@triton.jit
def _logs(x, w, stats):
    """(q, p, log q, log p)."""
    log_q = (x - stats.origin) * stats.scale_log2 * LN2 - stats.log_sum_exp
    p = w / stats.mass
    # A weight of 0 has no logarithm to take.
    return tl.exp(log_q), p, log_q, tl.where(p == 0.0, -INF, tl.log(tl.where(p == 0.0, 1.0, p)))


@triton.jit
def entry_values(entries, stats, by, spec):
    """(sum of the values, sum of h, sum of q where the teacher is finite) over the entries.

    For the reverse family h is q times the gap where there is one, of the sign that the value has.
    """
    zero = tl.zeros([spec.ENTRIES], tl.float32)
    values, slopes, both, infinite = zero, zero, zero, zero
    for start in range(0, entries.count, spec.ENTRIES):
        _, x, w, counts, _ = _load(entries, start, spec)
        q, p, log_q, log_p = _logs(x, w, stats)
        if spec.FAMILY == "element":
            value, h = element(p, q, log_p - log_q, log_p, log_q, by, spec.KIND, spec.CASE)
            slopes += tl.where(counts, h, 0.0)
        else:
            value = tl.where(p == 0.0, 0.0, p * (-log_q if spec.KIND == "soft_ce" else log_p - log_q))
            if spec.FAMILY == "reverse":
                h = tl.where(counts & (p != 0.0) & (x != -INF), q * (log_q - log_p), 0.0)
                slopes += h
                both += tl.where(counts & (p != 0.0), q, 0.0)
                infinite += tl.where(counts & (p == 0.0) & (x > -INF), 1.0, 0.0)
                value = 0.5 * (value + h) if spec.KIND == "symmetric_kl" else h
        values += tl.where(counts, value, 0.0)
    slopes = tl.sum(slopes, 0)
    values = sum_of_values(tl.sum(values, 0), slopes, spec.KIND)
    return tl.where(tl.max(infinite, 0) > 0.0, INF, values), slopes, tl.sum(both, 0)


@triton.jit
def argmax_of_entries(entries, spec):
    """(the largest weight, its id): the first of equal ones; -1 and -1 where there is none."""
    value, number = tl.full([spec.ENTRIES], -1.0, tl.float32), tl.full([spec.ENTRIES], 2147483647, tl.int32)
    best_id = tl.full([spec.ENTRIES], -1, tl.int32)
    for start in range(0, entries.count, spec.ENTRIES):
        at, column, w, _, good = _listed(entries, start, spec)
        wins = good & (w > value)
        value, number = tl.where(wins, w, value), tl.where(wins, at, number)
        best_id = tl.where(wins, column, best_id)
    best = tl.max(value, 0)
    first = tl.min(tl.where(value == best, number, 2147483647), 0)
    return best, tl.max(tl.where((value == best) & (number == first), best_id, -1), 0)


# ---- gradient --------------------------------------------------------------------------------------------------------


@triton.jit
def _entry_kd(q, p, log_q, log_p, x, weights, by, spec):
    if spec.FAMILY == "forward":
        g = weights.student * q - weights.teacher * p
    elif spec.FAMILY == "reverse":
        g = q * (tl.where((p != 0.0) & (x != -INF), log_q - log_p, 0.0) - weights.mean)
        if spec.KIND == "symmetric_kl":
            g = 0.5 * (g + (q - p))
    else:
        _, h = element(p, q, log_p - log_q, log_p, log_q, by, spec.KIND, spec.CASE)
        g = h - q * weights.mean
    return tl.where(weights.kd == 0.0, 0.0, weights.kd * g)


@triton.jit
def entry_gradient(to, probs, entries, stats, weights, row_max_tau1, targets, by, spec):
    """Writes the entries' gradient; the sweep before it has left their logits where they are read from."""
    tl.debug_barrier()
    for start in range(0, entries.count, spec.ENTRIES):
        column, x, w, counts, _ = _load(entries, start, spec)
        q, p, log_q, log_p = _logs(x, w, stats)
        g = _entry_kd(q, p, log_q, log_p, x, weights, by, spec)
        g += targets.slope * tl.exp2((x - origin_of(row_max_tau1)) * LOG2E) - targets.uniform
        if spec.LABELS:
            g += tl.where(column == targets.column, targets.at_column, 0.0)
        if spec.PROBS:
            g -= targets.probs * tl.load(probs + column, mask=counts, other=0.0).to(tl.float32)
        g = tl.where(x == -INF, 0.0, g) + targets.poison
        tl.store(to + column, g.to(to.dtype.element_ty), mask=counts)
