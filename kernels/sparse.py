"""``sparse_rows`` and its gradient forms: student logits against K (id, weight) entries, a tail, and the tail's shape.

A tail without a shape is one more class. With one, every column has a probability: a row of the table stands for the
teacher's exponentials, and the dense sweeps read it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast._calls import SparseCall
from kdfast.kernels.entries import (
    EntryLink,
    EntryWeights,
    best_entry,
    entries_of,
    entry_gradient,
    entry_sums,
    entry_values,
    mark,
    unmark,
)
from kdfast.kernels.launch import (
    KINDS,
    check_rows,
    constants_of,
    launch,
    load_of,
    programs_for,
    row_arguments,
    tile_for,
)
from kdfast.kernels.rowmath import INF, LN2, LOG2E, Parameters, log_odds, two_classes
from kdfast.kernels.rows import Row, coefficients, columns_of_tile, row_offset, store_parts, total
from kdfast.kernels.softmax import Link, Scale, Softmax, best_of, best_outside, entropy, merge, origin_of
from kdfast.kernels.statistics import ZScores, statistics
from kdfast.kernels.sweeps import (
    Backward,
    Ground,
    Weights,
    elements,
    first_value,
    gradient,
    gradient_beyond,
)
from kdfast.kernels.targets import label_of, slopes_of, softmax_beyond, truth_of
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "sparse_rows"]

# Entries that a loop takes at once.
ENTRIES = 128


@triton.jit
def _mass_beyond(shape, first, vocab, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of a shape's columns that the student lacks."""
    mass = tl.zeros([BLOCK // WIDTH], tl.float32)
    for start in range(first, vocab, BLOCK):
        column = start + columns_of_tile(BLOCK, WIDTH)
        mass += tl.sum(tl.load(shape + column, mask=column < vocab, other=0.0).to(tl.float32), 1)
    return tl.sum(mass, 0)


@triton.jit
def _links(s, sums, rest, scale, tail, outside, SHAPED: tl.constexpr):
    """(Link of the columns outside the entries, EntryLink, whether either side has nothing).

    `outside` is the sum of the shape there, over which the tail's mass is spread; `rest` the student's softmax.
    """
    dead = rest.z == 0.0
    z = tl.where(dead, 1.0, rest.z)
    # Columns that the student masks altogether have no origin to be relative to.
    down = tl.where(s.z_s == 0.0, 0.0, origin_of(s.top_s) - origin_of(rest.top)) * scale.student
    q, log_q = tl.exp2(down) / z, down * LN2 - tl.log(z)
    p, log_p, mass = rest.z * 0.0, rest.z * 0.0, rest.z * 0.0 + 1.0
    if SHAPED:
        none = (outside == 0.0) | (tail == -INF)
        log_c = tl.where(none, 0.0, tail - tl.log(tl.where(none, 1.0, outside)))
        c = tl.where(none, 0.0, tl.exp(log_c))
        mass = sums.mass + c * s.z_t
        dead = dead | (mass == 0.0)
        mass = tl.where(mass == 0.0, 1.0, mass)
        p, log_p = c / mass, log_c - tl.log(mass)
    link = Link(s.top_s, s.top_t, q, p, log_q, log_p, log_p - log_q)
    return link, EntryLink(origin_of(rest.top), scale.student, tl.log(z), mass), dead


@triton.jit
def _classes(s, sums, link, entry_link, entries, dead, tail, kd, by, KIND: tl.constexpr, ENTRIES: tl.constexpr):
    """(value, Weights, EntryWeights) against the entries and, as one more class, the tail."""
    value, _, _ = entry_values(entries, entry_link, by, KIND, "forward", "", ENTRIES)
    tail_mass, z_tail = tl.exp(tail), tl.where(s.z_s == 0.0, 1.0, s.z_s)
    # A tail without a column that the student leaves it is infinite.
    gap = (0.0 if KIND == "soft_ce" else tail) - (tl.log(z_tail) + link.log_q)
    value += tl.where(tail == -INF, 0.0, tl.where(s.z_s == 0.0, INF, tail_mass * gap))
    value = tl.where(s.z_s + sums.z != s.z_s + sums.z, float("nan"), tl.where(dead, 0.0, value))
    off = dead | (kd == 0.0)
    zero = tl.where(off, 0.0, kd * 0.0)
    kd, mass = tl.where(off, 0.0, kd), sums.mass + tail_mass
    student = tl.where(off, 0.0, kd * (mass * link.q - tl.where(s.z_s == 0.0, 0.0, tail_mass / z_tail)))
    weights = Weights(kd, student, zero, zero, zero, zero, zero, zero)
    return value, weights, EntryWeights(kd, mass, 1.0, zero)


@triton.jit
def _target_of(s, sums, link, entry_link, rest, dead, x_label, y_label, scale, tail, outside):
    """dkd's term of the target and the rest: (value, gap of the target's probabilities, whether a side is dead)."""
    mass = sums.mass + link.p * entry_link.mass * s.z_t
    spread = tl.log(tl.where(outside == 0.0, 1.0, y_label)) + tail - tl.log(tl.where(outside == 0.0, 1.0, outside))
    spread = tl.where((y_label > 0.0) & (outside > 0.0), spread, -INF)
    weight = tl.where(sums.target == 0.0, -INF, tl.log(tl.where(sums.target == 0.0, 1.0, sums.target)))
    log_p = tl.where(sums.has_target, weight, spread)
    odds_s = log_odds((x_label - origin_of(rest.top)) * scale.student, rest.z)
    odds_t = log_odds(log_p * LOG2E, mass)
    value, gap = two_classes(odds_s, odds_t)
    return value, gap, ((rest.z == 0.0) & (x_label == -INF)) | ((mass == 0.0) & (log_p == -INF))


@triton.jit
def _spread(
    at,
    s,
    sums,
    link,
    entry_link,
    entries,
    rest,
    dead,
    x_label,
    y_label,
    scale,
    tail,
    outside,
    kd,
    by,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """(value, Weights, EntryWeights) against the entries and a tail that has a shape."""
    value, slope, both = entry_values(entries, entry_link, by, KIND, FAMILY, CASE, ENTRIES)
    zero = kd * 0.0
    student, teacher, mean, target = 1.0 + zero, 1.0 + zero, zero, zero
    if FAMILY == "element":
        columns, of_columns = elements(at, link, scale, by, KIND, CASE, "shape", BLOCK, WIDTH)
        value, slope = value + columns, slope + of_columns
        mean = slope
    else:
        value += first_value(s, link, KIND, FAMILY)
        if FAMILY == "reverse":
            mean = link.q * s.cross_s + (slope + link.gap * both) / LN2
            both += link.q * s.both
            slope = mean * LN2 - link.gap * both
    if KIND == "dkd":
        term, gap, no_target = _target_of(s, sums, link, entry_link, rest, dead, x_label, y_label, scale, tail, outside)
        value = by.a * term + tl.where(dead, 0.0, by.b * value)
        target, teacher = by.a * gap, tl.where(dead, 0.0, by.b)
        student, dead = teacher - target, no_target
    off = dead | (kd == 0.0)
    broken = (outside != outside) | (outside == INF) | (entry_link.mass != entry_link.mass) | (rest.z != rest.z)
    value = tl.where(broken, float("nan"), tl.where(dead, 0.0, value))
    kd = tl.where(off, 0.0, kd)
    by_e, by_r = tl.where(off, 0.0, kd * student * link.q), tl.where(off, 0.0, kd * teacher * link.p)
    weights = Weights(kd, by_e, by_r, mean, both, tl.where(off, 0.0, kd * target), zero, zero)
    return value, weights, EntryWeights(kd, student, teacher, slope)


@triton.jit
def _sparse(
    student,
    ids,
    weights,
    offsets,
    tail,
    shape,
    shapes,
    marks,
    grad,
    label,
    probs,
    coef,
    loss,
    parts,
    rows,
    inner,
    outer_s,
    inner_s,
    outer_g,
    inner_g,
    outer_p,
    inner_p,
    columns,
    shared,
    vocab,
    shape_count,
    entry_count,
    words,
    smoothing,
    a,
    b,
    rest,
    minus_log_a,
    minus_log_rest,
    factor,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    LABELS: tl.constexpr = label is not None
    PARTS: tl.constexpr = parts is not None
    SHAPED: tl.constexpr = shapes is not None
    TEACHER: tl.constexpr = "shape" if shapes is not None else "none"
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    by = Parameters(a, b, rest, minus_log_a, minus_log_rest)
    marked = marks + first * words
    for turn in range(tl.cdiv(rows - tl.program_id(0), step)):
        row = first + turn * step
        c = coefficients(coef, row, rows, False, LABELS or probs is not None)
        x_row = student + row_offset(row, inner, outer_s, inner_s)
        p_row = probs
        if probs is not None:
            p_row = probs + row_offset(row, inner, outer_p, inner_p)
        target, x_label, has_label = -1, -INF, False
        if LABELS:
            target, x_label, has_label = label_of(label, row, x_row, columns, c.counts)
        wanted = c.counts if PARTS else c.kd != 0.0
        bound = tl.where(c.counts, shared, 0)
        bound_t, bound_kd = tl.where(wanted, shared, 0), tl.where(c.kd != 0.0, shared, 0)
        log_tail = c.kd * 0.0 - INF
        if tail is not None:
            log_tail = tl.load(tail + row)
        good, y_row, y_label = c.counts | True, x_row, 0.0
        if SHAPED:
            index = tl.load(shape + row)
            good = (index >= 0) & (index < shape_count)
            y_row = shapes + tl.where(good, index, 0) * vocab
            read = good & (log_tail != -INF)
            bound_t, bound_kd = tl.where(read, bound_t, 0), tl.where(read, bound_kd, 0)
        apart = -1
        if KIND == "dkd":
            apart = target
            good = good & has_label & (target < shared)
            y_label = tl.load(y_row + target, mask=has_label & (target < bound_t), other=0.0).to(tl.float32)
        entries, whole_row = entries_of(ids, weights, offsets, row, entry_count, x_row, marked, shared, apart, wanted)
        good = good & whole_row & (mark(entries, ENTRIES) == 0)

        has_truth = (c.ce != 0.0) | (c.z != 0.0)
        bits = LOG2E / c.tau_s
        scale = Scale(bits, bits, c.tau_s == 2.0, has_truth & (c.tau_s != 1.0) & (c.tau_s != 2.0))
        z = ZScores(0.0, 1.0, 1.0, 0.0, 1.0)
        at = Row(x_row, y_row, p_row, marked, bound, bound_t, apart)
        s, labelled = statistics(at, scale, z, KIND, FAMILY, TEACHER, SMOOTH, BLOCK, WIDTH)
        sums = entry_sums(entries, scale, ENTRIES)
        in_entries = Softmax(sums.top, sums.z_one)
        if KIND == "dkd":
            in_entries = merge(in_entries, Softmax(tl.where(target < shared, x_label, -INF), 1.0), LOG2E)
        whole = Row(x_row, y_row, p_row, None, tl.where(c.counts, columns, 0), 0, apart)
        one, labelled = softmax_beyond(Softmax(s.top_s, s.z_one), labelled, whole, shared, SMOOTH, BLOCK, WIDTH)
        one, truth = truth_of(one, labelled, probs, in_entries, c, x_label, has_label, smoothing, SMOOTH)

        over = merge(Softmax(s.top_s, s.z_s), Softmax(sums.top, sums.z), scale.student)
        outside = s.z_t
        if SHAPED:
            outside += _mass_beyond(y_row, shared, tl.where(bound_t > 0, vocab, 0), BLOCK, WIDTH)
            outside += tl.where(sums.has_target, 0.0, y_label)
        link, entry_link, dead = _links(s, sums, over, scale, log_tail, outside, SHAPED)
        kd = c.kd * factor / c.tau_s
        if SHAPED:
            at = Row(x_row, y_row, p_row, marked, tl.where(wanted, bound, 0), bound_t, apart)
            value, slopes, entry_slopes = _spread(
                at,
                s,
                sums,
                link,
                entry_link,
                entries,
                over,
                dead,
                x_label,
                y_label,
                scale,
                log_tail,
                outside,
                kd,
                by,
                KIND,
                FAMILY,
                CASE,
                BLOCK,
                WIDTH,
                ENTRIES,
            )
        else:
            value, slopes, entry_slopes = _classes(
                s, sums, link, entry_link, entries, dead, log_tail, kd, by, KIND, ENTRIES
            )
        value = tl.where(good & (c.is_bad == 0), factor * value, float("nan"))
        result = total(c, value, truth)
        tl.store(loss + row, result)
        if PARTS:
            ce = truth.ce
            if LABELS:
                ce = tl.where(has_label, ce, 0.0)
            elif probs is None:
                ce = 0.0
            weight, best = best_entry(entries, ENTRIES)
            if SHAPED:
                at = Row(x_row, y_row, p_row, marked, bound, bound_t, -1)
                other = best_outside(at, BLOCK, WIDTH)
                best = tl.where(link.p * entry_link.mass * other.value > weight, other.column, best)
            agree = best_of(x_row, bound, BLOCK, WIDTH).column == best
            store_parts(parts, row, rows, c.counts, value, ce, entropy(x_row, bound, c.bits, BLOCK, WIDTH), agree)
        if grad is not None:
            g_row = grad + row_offset(row, inner, outer_g, inner_g)
            slope, at_column = slopes_of(one, truth, x_label, KIND == "dkd")
            poison = tl.where(result != result, float("nan"), 0.0)
            ground = Ground(slope, truth.share, truth.label, target, -truth.label, poison)
            gradient_beyond(g_row, shared, columns, whole, one.top, ground, LABELS, BLOCK, WIDTH)
            down = tl.exp2((origin_of(link.top_s) - origin_of(one.top)) * LOG2E)
            ground_shared = Ground(slope * down, truth.share, truth.label, target, -truth.label, poison)
            at = Row(x_row, y_row, p_row, marked, bound, bound_kd, apart)
            backward = Backward(at, link, slopes, scale, z, by, ground_shared)
            gradient(g_row, shared, backward, KIND, FAMILY, CASE, TEACHER, False, LABELS, BLOCK, WIDTH)
            entry_gradient(
                g_row,
                p_row,
                entries,
                entry_link,
                entry_slopes,
                one.top,
                ground,
                by,
                KIND,
                FAMILY,
                CASE,
                LABELS,
                ENTRIES,
            )
            if KIND == "dkd":
                g = tl.where(x_label == -INF, 0.0, slopes.target + at_column - truth.share) + poison
                tl.store(g_row + target, g.to(grad.dtype.element_ty), mask=has_label & (target < shared))
        unmark(entries, ENTRIES)


def _check(ids: Tensor, offsets: Tensor, rows: int, shape: Tensor | None, shapes: Tensor | None, kind: int) -> None:
    """What the kernel takes for granted; whether offsets and indices are in range it sees for itself."""
    if offsets.numel() != rows + 1:
        raise ValueError(f"offsets must be ({rows + 1},), got {tuple(offsets.shape)}")
    if (shape is None) != (shapes is None):
        raise ValueError("shape and shapes belong together")
    if shapes is None and KINDS[kind] not in ("forward_kl", "soft_ce"):
        raise ValueError(f"divergence {KINDS[kind]} needs the shapes of the tails")
    if KINDS[kind] == "logit_mse":
        raise ValueError("logit_mse needs the teacher's logits")


def _arguments(student: Tensor, grad: Tensor | None, call: SparseCall) -> tuple[dict[str, Any], int]:
    """(the kernel's, its number of warps among them, and its programs)."""
    check_rows(student=student, label_probs=call.label_probs)
    rows, columns, shapes = student.shape[0] * student.shape[1], student.shape[2], call.prototypes
    _check(call.ids, call.offsets, rows, call.prototype_ids, shapes, call.kind)
    constants = {**constants_of(call.kind, call.a, call.b), "STANDARDIZE": False, "SMOOTH": call.smoothing != 0.0}
    load = load_of(constants, columns, call.label_probs is not None, student, call.label_probs, grad)
    if shapes is not None:  # a second row to read, with a logarithm per column
        load = {"light": "heavy", "heavy": "heavy" if call.label_probs is None else "odd"}.get(load, load)
    tile, width = tile_for(load, columns, student)
    del constants["STANDARDIZE"]
    programs = programs_for(rows, student.device, tile.programs)
    # A bit per column for each program, up to whole tiles.
    words = -(-columns // tile.block) * tile.block // 32
    given = {
        **row_arguments(student, grad, call),
        "ids": call.ids,
        "weights": call.weights,
        "offsets": call.offsets,
        "tail": call.tail,
        "shape": call.prototype_ids,
        "shapes": shapes,
        "marks": torch.zeros(programs * words, dtype=torch.int32, device=student.device),
        "shared": min(columns, call.vocab),
        "vocab": call.vocab,
        "shape_count": 0 if shapes is None else shapes.shape[0],
        "entry_count": call.ids.numel(),
        "words": words,
        **constants,
        "BLOCK": tile.block,
        "WIDTH": width,
        "ENTRIES": ENTRIES,
        **tile.options(),
    }
    return given, programs


def sparse_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, rows) parts of ``torch.ops.kdfast.sparse_rows``' arguments.

    The gradient of the losses' sum goes to ``grad``, which may be the student's own memory.
    """
    return launch(_sparse, *_arguments(student, grad, SparseCall(*arguments)))


def _variant(
    dtype: torch.dtype, columns: int, divergence: str, table: torch.dtype | None, everyday: bool = False, **options: Any
) -> Variant:
    """A call's, by the student's dtype and vocabulary, and the dtype of the tails' shapes; none: one more class."""

    def of(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    rows, student, numbers = 4096, of(64, 64, columns, dtype=dtype), of(4096, dtype=torch.int64)
    shape, shapes = (None, None) if table is None else (numbers, of(256, columns, dtype=table))
    call = SparseCall(
        of(rows * 64, dtype=torch.int32),
        of(rows * 64),
        of(rows + 1, dtype=torch.int64),
        of(rows),
        columns,
        shape,
        shapes,
        KINDS.index(divergence),
        0.5,
        0.25,
        1.0,
        of(5, rows),
        numbers,
        student if "probs" in options else None,
        options.get("smoothing", 0.0),
        "parts" in options,
    )
    arguments, _ = _arguments(student, student, call)
    odd = ["odd"] if columns % 8 else []
    said = [f"{key}={value}" for key, value in options.items()]
    name = "-".join(
        [str(dtype)[6:], divergence, str(columns), "class" if table is None else str(table)[6:], *odd, *said]
    )
    return Variant.of_call(name, _sparse, arguments, everyday)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SHAPED = [name for name in KINDS if name != "logit_mse"]
VARIANTS = [
    _variant(_BF16, 128256, "forward_kl", None, True),
    _variant(_BF16, 50257, "forward_kl", None, True),
    _variant(_BF16, 128256, "forward_kl", _BF16, True),
    _variant(_BF16, 128256, "jsd", _BF16, True),
    *(_variant(dtype, columns, "soft_ce", None) for dtype in (_FP16, _FP32) for columns in (1000, 2000, 32000, 50257)),
    *(_variant(_BF16, 128256, name, _FP32) for name in _SHAPED),
    *(_variant(_FP32, 50257, name, _BF16) for name in _SHAPED),
    *(_variant(_BF16, 128256, "forward_kl", table, parts=True) for table in (None, _BF16)),
    *(_variant(_BF16, 128256, "forward_kl", table, smoothing=0.1) for table in (None, _BF16)),
    *(_variant(_BF16, 128256, "forward_kl", table, probs=True, smoothing=0.1) for table in (None, _BF16)),
]
