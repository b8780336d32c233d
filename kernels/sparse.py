"""``sparse_rows`` and its gradient forms: student logits against K (id, weight) entries and a tail.

A tail without a prototype is one more class. With one, every column has a probability: the prototype, a row of a table
of probabilities, says how the tail's mass is spread, and the dense sweeps read it in place of the teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast._calls import KINDS, SparseCall
from kdfast.kernels.entries import (
    EntryLists,
    EntryStats,
    EntryWeights,
    argmax_of_entries,
    entries_of,
    entry_gradient,
    entry_sums,
    entry_values,
    mark,
    unmark,
)
from kdfast.kernels.launch import (
    check_rows,
    check_vectors,
    cost_of_column,
    launch,
    programs_for,
    row_arguments,
    spec_of,
    tile_for,
)
from kdfast.kernels.rowmath import INF, LN2, LOG2E, WITHOUT_PROTOTYPES, log_odds, two_classes
from kdfast.kernels.rows import (
    Row,
    Sizes,
    loss_of,
    per_group,
    row_pointer,
    tile_columns,
    with_bounds,
)
from kdfast.kernels.softmax import (
    Softmax,
    SoftmaxStats,
    Temperatures,
    argmax_outside_entries,
    merge,
    origin_of,
    store_parts,
)
from kdfast.kernels.statistics import no_zscores, statistics
from kdfast.kernels.sweeps import Backward, Weights, elements, gradient, gradient_student_only, value_of_sums
from kdfast.kernels.targets import (
    add_student_only,
    at_left_out_label,
    known_cross_entropy,
    open_row,
    target_gradient,
    target_terms,
    with_origin,
)
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "sparse_rows"]

# Entries that a loop takes at once.
ENTRIES = 128


class Tails(NamedTuple):
    """A kernel's argument: what the teacher leaves outside the entries of every row."""

    log_mass: tl.tensor  # (rows,) float32; None: nothing
    prototype_ids: tl.tensor  # (rows,) int64; None: one more class
    prototypes: tl.tensor  # (count, vocab) probabilities
    count: tl.tensor
    vocab: tl.tensor  # the teacher's


class Marks(NamedTuple):
    """A kernel's argument: for each program a bit per column, up to whole tiles, all 0."""

    words: tl.tensor
    per_program: tl.tensor  # words of a program


class _Tail(NamedTuple):
    """One row's tail as it is before the sweep."""

    log_mass: tl.tensor  # -inf: none
    prototype: tl.tensor  # pointer to it; without one, the student's
    good: tl.tensor  # the prototype is one of the table


class _Spread(NamedTuple):
    """How a row's tail is spread over its columns."""

    log_mass: tl.tensor  # -inf: none
    at_target: tl.tensor  # the prototype at dkd's target
    outside: tl.tensor  # the prototype's sum over the columns that are no entries


class _Loaded(NamedTuple):
    """What is known of a row before its sweep."""

    row: tl.tensor
    student_only: tl.tensor  # the row with the columns that only the student has
    entries: tl.tensor
    label: tl.tensor
    log_mass: tl.tensor
    at_target: tl.tensor
    wanted: tl.tensor  # the divergence counts, or the parts are wanted
    bound_kd: tl.tensor  # columns that the divergence's gradient reads of the prototype
    good: tl.tensor  # ids, offsets, prototype and label are in range


class _Sums(NamedTuple):
    """A row's sums, from which the divergence follows."""

    columns: tl.tensor  # Statistics of the columns that are no entries
    entries: tl.tensor  # EntrySums
    whole: tl.tensor  # the student's Softmax over both


class _Stats(NamedTuple):
    """What makes probabilities of exponentials and weights."""

    columns: tl.tensor  # SoftmaxStats of the columns that are no entries
    entries: tl.tensor  # EntryStats
    dead: tl.tensor  # a side has nothing


# ---- load ------------------------------------------------------------------------------------------------------------


@triton.jit
def _tail_of(tails, row_id, c, logits, spec):
    """A row's _Tail."""
    log_mass, prototype, good = c.kd * 0.0 - INF, logits, c.counts | True
    if tails.log_mass is not None:
        log_mass = tl.load(tails.log_mass + row_id)
    if spec.TEACHER == "prototype":
        index = tl.load(tails.prototype_ids + row_id)
        good = (index >= 0) & (index < tails.count)
        prototype = tails.prototypes + tl.where(good, index, 0) * tails.vocab
    return _Tail(log_mass, prototype, good)


@triton.jit
def _load(row_id, opened, lists, tails, marks, sizes, PARTS: tl.constexpr, spec):
    """A row's _Loaded, with the entries' columns marked."""
    c, logits, probs, label = opened
    wanted = c.counts if PARTS else c.kd != 0.0
    bound = tl.where(c.counts, sizes.shared, 0)
    bound_t, bound_kd = tl.where(wanted, sizes.shared, 0), tl.where(c.kd != 0.0, sizes.shared, 0)
    log_mass, prototype, good = _tail_of(tails, row_id, c, logits, spec)
    if spec.TEACHER == "prototype":
        read = good & (log_mass != -INF)
        bound_t, bound_kd = tl.where(read, bound_t, 0), tl.where(read, bound_kd, 0)
    excluded, at_target = -1, 0.0
    if spec.KIND == "dkd":
        excluded = label.column
        good = good & label.found & (label.column < sizes.shared)
        inside = label.found & (label.column < bound_t)
        at_target = tl.load(prototype + label.column, mask=inside, other=0.0).to(tl.float32)
    entries, whole = entries_of(lists, row_id, logits, marks, sizes.shared, excluded, wanted)
    good = good & whole & (mark(entries, spec) == 0)
    row = Row(logits, prototype, probs, marks, bound, bound_t, excluded)
    student_only = with_bounds(row, tl.where(c.counts, sizes.columns, 0), 0)
    return _Loaded(row, student_only, entries, label, log_mass, at_target, wanted, bound_kd, good)


# ---- statistics ------------------------------------------------------------------------------------------------------


@triton.jit
def _temperatures(c):
    """The student's temperature for both sides: cached labels have the teacher's in them."""
    has_terms = (c.ce != 0.0) | (c.z_weight != 0.0)
    scale_log2, separate = LOG2E / c.tau_s, has_terms & (c.tau_s != 1.0) & (c.tau_s != 2.0)
    return Temperatures(scale_log2, scale_log2, c.tau_s == 2.0, separate)


@triton.jit
def _prototype_beyond(prototype, first, vocab, spec):
    """The sum of a prototype's columns that the student lacks."""
    mass = per_group(0.0, spec)
    for start in range(first, vocab, spec.BLOCK):
        column = tile_columns(start, spec)
        mass += tl.sum(tl.load(prototype + column, mask=column < vocab, other=0.0).to(tl.float32), 1)
    return tl.sum(mass, 0)


@triton.jit
def _sums(loaded, c, tau, smoothing, vocab, sizes, spec):
    """(_Sums, _Spread, the student's softmax at temperature 1, TargetTerms) of a row."""
    label = loaded.label
    s, target_sums = statistics(loaded.row, tau, no_zscores(), spec)
    e = entry_sums(loaded.entries, tau, spec)
    left_out = Softmax(e.row_max, e.sum_exp_tau1)
    if spec.KIND == "dkd":
        x_target = tl.where(label.column < sizes.shared, label.logit, -INF)
        left_out = merge(left_out, Softmax(x_target, 1.0), LOG2E)
    softmax_tau1 = Softmax(s.row_max_s, s.sum_exp_tau1)
    softmax_tau1, target_sums = add_student_only(softmax_tau1, target_sums, loaded.student_only, sizes.shared, spec)
    softmax_tau1, terms = target_terms(softmax_tau1, target_sums, left_out, c, label, smoothing, spec)
    whole = merge(Softmax(s.row_max_s, s.sum_exp_s), Softmax(e.row_max, e.sum_exp), tau.scale_log2_s)
    outside = s.sum_exp_t
    if spec.TEACHER == "prototype":
        vocab = tl.where(loaded.row.bound_t > 0, vocab, 0)
        outside += _prototype_beyond(loaded.row.teacher, sizes.shared, vocab, spec)
        outside += tl.where(e.has_target, 0.0, loaded.at_target)
    return _Sums(s, e, whole), _Spread(loaded.log_mass, loaded.at_target, outside), softmax_tau1, terms


@triton.jit
def _stats(sums, spread, tau, spec):
    """_Stats: the tail's mass is spread over the prototype's columns that are no entries."""
    s, whole = sums.columns, sums.whole
    dead = whole.sum_exp == 0.0
    sum_exp = tl.where(dead, 1.0, whole.sum_exp)
    # Columns that the student masks altogether have no origin to be relative to.
    down = tl.where(s.sum_exp_s == 0.0, 0.0, origin_of(s.row_max_s) - origin_of(whole.row_max)) * tau.scale_log2_s
    q, log_q = tl.exp2(down) / sum_exp, down * LN2 - tl.log(sum_exp)
    p, log_p, mass = whole.sum_exp * 0.0, whole.sum_exp * 0.0, whole.sum_exp * 0.0 + 1.0
    if spec.TEACHER == "prototype":
        none = (spread.outside == 0.0) | (spread.log_mass == -INF)
        log_c = tl.where(none, 0.0, spread.log_mass - tl.log(tl.where(none, 1.0, spread.outside)))
        c = tl.where(none, 0.0, tl.exp(log_c))
        mass = sums.entries.mass + c * s.sum_exp_t
        dead = dead | (mass == 0.0)
        mass = tl.where(mass == 0.0, 1.0, mass)
        p, log_p = c / mass, log_c - tl.log(mass)
    columns = SoftmaxStats(s.row_max_s, s.row_max_t, q, p, log_q, log_p, log_p - log_q)
    return _Stats(columns, EntryStats(origin_of(whole.row_max), tau.scale_log2_s, tl.log(sum_exp), mass), dead)


# ---- value -----------------------------------------------------------------------------------------------------------


@triton.jit
def _against_classes(loaded, sums, stats, spread, kd, by, spec):
    """(value, Weights, EntryWeights) against the entries and, as one more class, the tail."""
    value, _, _ = entry_values(loaded.entries, stats.entries, by, spec)
    sum_exp = sums.columns.sum_exp_s
    tail_mass, sum_tail = tl.exp(spread.log_mass), tl.where(sum_exp == 0.0, 1.0, sum_exp)
    # A tail without a column that the student leaves it is infinite.
    gap = (0.0 if spec.KIND == "soft_ce" else spread.log_mass) - (tl.log(sum_tail) + stats.columns.log_norm_q)
    value += tl.where(spread.log_mass == -INF, 0.0, tl.where(sum_exp == 0.0, INF, tail_mass * gap))
    both = sum_exp + sums.entries.sum_exp
    value = tl.where(both != both, float("nan"), tl.where(stats.dead, 0.0, value))
    off = stats.dead | (kd == 0.0)
    zero = tl.where(off, 0.0, kd * 0.0)
    kd, mass = tl.where(off, 0.0, kd), sums.entries.mass + tail_mass
    of_tail = tl.where(sum_exp == 0.0, 0.0, tail_mass / sum_tail)
    student = tl.where(off, 0.0, kd * (mass * stats.columns.norm_q - of_tail))
    return value, Weights(kd, student, zero, zero, zero, zero, zero, zero), EntryWeights(kd, mass, 1.0, zero)


@triton.jit
def _two_classes(sums, stats, spread, tau, label):
    """dkd's term of the target and the rest: (value, gap of the target's probabilities, whether a side is dead)."""
    e, whole, outside = sums.entries, sums.whole, spread.outside
    mass = e.mass + stats.columns.norm_p * stats.entries.mass * sums.columns.sum_exp_t
    log_spread = tl.log(tl.where(outside == 0.0, 1.0, spread.at_target)) + spread.log_mass
    log_spread -= tl.log(tl.where(outside == 0.0, 1.0, outside))
    log_spread = tl.where((spread.at_target > 0.0) & (outside > 0.0), log_spread, -INF)
    weight = tl.where(e.target == 0.0, -INF, tl.log(tl.where(e.target == 0.0, 1.0, e.target)))
    log_p = tl.where(e.has_target, weight, log_spread)
    odds_s = log_odds((label.logit - origin_of(whole.row_max)) * tau.scale_log2_s, whole.sum_exp)
    value, gap = two_classes(odds_s, log_odds(log_p * LOG2E, mass))
    dead = ((whole.sum_exp == 0.0) & (label.logit == -INF)) | ((mass == 0.0) & (log_p == -INF))
    return value, gap, dead


@triton.jit
def _against_prototype(loaded, sums, stats, spread, tau, kd, by, spec):
    """(value, Weights, EntryWeights) against the entries and a tail that has a prototype."""
    columns, dead, row = stats.columns, stats.dead, loaded.row
    value, slope, both = entry_values(loaded.entries, stats.entries, by, spec)
    zero = kd * 0.0
    student, teacher, mean, target = 1.0 + zero, 1.0 + zero, zero, zero
    if spec.FAMILY == "element":
        row = with_bounds(row, tl.where(loaded.wanted, row.bound, 0), row.bound_t)
        of_columns, slopes = elements(row, columns, tau, by, spec)
        value, slope = value + of_columns, slope + slopes
        mean = slope
    else:
        value += value_of_sums(sums.columns, columns, spec)
        if spec.FAMILY == "reverse":
            mean = columns.norm_q * sums.columns.cross_s + (slope + columns.log_norm_gap * both) / LN2
            both += columns.norm_q * sums.columns.both
            slope = mean * LN2 - columns.log_norm_gap * both
    if spec.KIND == "dkd":
        term, gap, no_target = _two_classes(sums, stats, spread, tau, loaded.label)
        # A term of weight 0 is left out: it may be infinite.
        value = tl.where(by.a == 0.0, 0.0, by.a * term) + tl.where(dead | (by.b == 0.0), 0.0, by.b * value)
        target, teacher = by.a * gap, tl.where(dead, 0.0, by.b)
        student, dead = teacher - target, no_target
    off, mass, sum_exp, outside = dead | (kd == 0.0), stats.entries.mass, sums.whole.sum_exp, spread.outside
    broken = (outside != outside) | (outside == INF) | (mass != mass) | (sum_exp != sum_exp)
    value = tl.where(broken, float("nan"), tl.where(dead, 0.0, value))
    kd = tl.where(off, 0.0, kd)
    by_e, by_p = tl.where(off, 0.0, kd * student * columns.norm_q), tl.where(off, 0.0, kd * teacher * columns.norm_p)
    weights = Weights(kd, by_e, by_p, mean, both, tl.where(off, 0.0, kd * target), zero, zero)
    return value, weights, EntryWeights(kd, student, teacher, slope)


@triton.jit
def _argmax_of_teacher(loaded, stats, spec):
    """The column where the teacher is largest: an entry's, or the prototype's best other one."""
    weight, best = argmax_of_entries(loaded.entries, spec)
    if spec.TEACHER == "prototype":
        r = loaded.row
        row = Row(r.student, r.teacher, r.probs, r.marks, r.bound, r.bound_t, -1)
        other = argmax_outside_entries(row, spec)
        best = tl.where(stats.columns.norm_p * stats.entries.mass * other.value > weight, other.column, best)
    return best


# ---- gradient --------------------------------------------------------------------------------------------------------


@triton.jit
def _write_gradient(to, sizes, loaded, back, stats, entry_weights, softmax_tau1, spec):
    """Writes the row's gradient: the student's lone columns, the shared ones, and then the entries over these."""
    targets, label, row_max = back.targets, loaded.label, softmax_tau1.row_max
    gradient_student_only(to, sizes.shared, sizes.columns, loaded.student_only, row_max, targets, spec)
    shared = with_origin(targets, softmax_tau1, back.stats.row_max_s, targets.at_column)
    back = Backward(back.row, back.stats, back.weights, back.tau, back.zscores, back.by, shared)
    gradient(to, sizes.shared, back, spec)
    entries, probs = loaded.entries, loaded.row.probs
    entry_gradient(to, probs, entries, stats.entries, entry_weights, row_max, targets, back.by, spec)
    if spec.KIND == "dkd":
        g = back.weights.target + at_left_out_label(targets, softmax_tau1, label.logit) - targets.uniform
        g = tl.where(label.logit == -INF, 0.0, g) + targets.poison
        tl.store(to + label.column, g.to(to.dtype.element_ty), mask=label.found & (label.column < sizes.shared))


# ---- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _sparse_row(row_id, student, grad, lists, tails, marks, targets, coef, results, sizes, by, spec):
    """Computes one row; ``marks`` are its program's."""
    opened = open_row(row_id, student, targets, coef, sizes, spec)
    c, label = opened.coefficients, opened.label
    loaded = _load(row_id, opened, lists, tails, marks, sizes, results.parts is not None, spec)
    tau = _temperatures(c)
    sums, spread, softmax_tau1, terms = _sums(loaded, c, tau, targets.smoothing, tails.vocab, sizes, spec)
    stats = _stats(sums, spread, tau, spec)
    kd_weight = c.kd * by.scale / c.tau_s
    if spec.TEACHER == "prototype":
        kd, weights, entry_weights = _against_prototype(loaded, sums, stats, spread, tau, kd_weight, by, spec)
    else:
        kd, weights, entry_weights = _against_classes(loaded, sums, stats, spread, kd_weight, by, spec)
    kd = tl.where(loaded.good & (c.is_bad == 0), by.scale * kd, float("nan"))
    loss = loss_of(c, kd, terms)
    tl.store(results.loss + row_id, loss)
    if results.parts is not None:
        ce, column_t = known_cross_entropy(terms, label, spec), _argmax_of_teacher(loaded, stats, spec)
        store_parts(results.parts, row_id, sizes.rows, loaded.row, c, kd, ce, column_t, spec)
    if grad is not None:
        row = with_bounds(loaded.row, loaded.row.bound, loaded.bound_kd)
        of_targets = target_gradient(softmax_tau1, terms, label, loss)
        back = Backward(row, stats.columns, weights, tau, no_zscores(), by, of_targets)
        to = row_pointer(grad, row_id, sizes.inner)
        _write_gradient(to, sizes, loaded, back, stats, entry_weights, softmax_tau1, spec)
    unmark(loaded.entries, spec)


@triton.jit
def _sparse(student, grad, lists, tails, marks, targets, coef, results, sizes, by, spec):
    """Every n-th row of n programs."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    words = marks.words + first * marks.per_program
    for turn in range(tl.cdiv(sizes.rows - tl.program_id(0), step)):
        row_id = first + turn * step
        _sparse_row(row_id, student, grad, lists, tails, words, targets, coef, results, sizes, by, spec)


# ---- launch ----------------------------------------------------------------------------------------------------------


def _check(call: SparseCall, rows: int) -> None:
    """What the kernel takes for granted; whether offsets and indices are in range it sees for itself."""
    name, entries = KINDS[call.kind], call.ids.numel()
    check_vectors(
        ids=(call.ids, torch.int32, entries),
        weights=(call.weights, torch.float32, entries),
        offsets=(call.offsets, torch.int64, rows + 1),
        tail=(call.tail, torch.float32, rows),
        prototype_ids=(call.prototype_ids, torch.int64, rows),
    )
    if call.vocab < 0:
        raise ValueError(f"vocab must not be negative, got {call.vocab}")
    if call.prototypes is not None and (
        call.prototypes.dim() != 2 or call.prototypes.shape[1] != call.vocab or not call.prototypes.is_contiguous()
    ):
        raise ValueError(
            f"prototypes must be a contiguous (prototypes, {call.vocab}) table, got {tuple(call.prototypes.shape)} "
            f"with strides {call.prototypes.stride()}"
        )
    if (call.prototype_ids is None) != (call.prototypes is None):
        raise ValueError("prototype_ids and prototypes belong together")
    if call.prototypes is None and name not in WITHOUT_PROTOTYPES:
        raise ValueError(f"divergence {name} needs prototypes of the tails")
    if name == "logit_mse":
        raise ValueError("logit_mse needs the teacher's logits")


def _arguments(student: Tensor, grad: Tensor | None, call: SparseCall) -> tuple[dict[str, Any], int]:
    """(the kernel's arguments and options, programs)."""
    check_rows(student=student, label_probs=call.label_probs)
    (outer, inner, columns), prototypes = student.shape, call.prototypes
    _check(call, outer * inner)
    cost = cost_of_column(call, False, student, call.label_probs, grad)
    if prototypes is not None:  # a second row to read, with a logarithm per column
        cost = {"light": "heavy", "heavy": "heavy" if call.label_probs is None else "odd"}.get(cost, cost)
    tile, width = tile_for(cost, columns, student)
    programs = programs_for(outer * inner, student.device, tile.programs)
    words = -(-columns // tile.block) * tile.block // 32
    count = 0 if prototypes is None else prototypes.shape[0]
    arguments = {
        **row_arguments(student, grad, call),
        "lists": EntryLists(call.ids, call.weights, call.offsets, call.ids.numel()),
        "tails": Tails(call.tail, call.prototype_ids, prototypes, count, call.vocab),
        "marks": Marks(torch.zeros(programs * words, dtype=torch.int32, device=student.device), words),
        "sizes": Sizes(outer * inner, inner, columns, min(columns, call.vocab)),
        "spec": spec_of(call, tile, width, "none" if prototypes is None else "prototype", entries=ENTRIES),
        **tile.options(),
    }
    return arguments, programs


def sparse_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The losses of student rows against cached rows of entries and tails, and their gradient.

    Args:
        student: (outer, inner, vocabulary) bfloat16, float16 or float32, of unit stride along the vocabulary.
        grad: like ``student``, where the gradient of the losses' sum goes; it may be the student's own memory. None:
            no gradient is wanted.
        arguments: the others of ``torch.ops.kdfast.sparse_rows``, which ``kdfast._calls.SparseCall`` names.

    Returns:
        (rows,) float32 losses, and (4, rows) float32 parts, (4, 0) where the call does not want them. A row whose ids,
        offsets, prototype or label are out of range has a loss of NaN.

    Raises:
        ValueError: a tensor of another size, dtype or layout than the kernel reads; a divergence that cannot be
            computed from what the call has.
    """
    return launch(_sparse, *_arguments(student, grad, SparseCall(*arguments)))


# ---- forms that are compiled ahead of time ---------------------------------------------------------------------------


def _variant(
    dtype: torch.dtype, columns: int, divergence: str, table: torch.dtype | None, everyday: bool = False, **options: Any
) -> Variant:
    """The form of a call, by the student's dtype and vocabulary, and the prototypes' dtype; None: one more class."""

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    rows, student = 4096, meta(64, 64, columns, dtype=dtype)
    call = SparseCall(
        ids=meta(rows * 64, dtype=torch.int32),
        weights=meta(rows * 64),
        offsets=meta(rows + 1, dtype=torch.int64),
        tail=meta(rows),
        vocab=columns,
        prototype_ids=None if table is None else meta(rows, dtype=torch.int64),
        prototypes=None if table is None else meta(256, columns, dtype=table),
        kind=KINDS.index(divergence),
        a=0.5,
        b=0.25,
        scale=1.0,
        coef=meta(5, rows),
        label=meta(rows, dtype=torch.int64),
        label_probs=student if "probs" in options else None,
        smoothing=options.get("smoothing", 0.0),
        want_parts="parts" in options,
    )
    arguments, _ = _arguments(student, student, call)
    odd = ["odd"] if columns % 8 else []
    others = [f"{key}={value}" for key, value in options.items()]
    tail = "class" if table is None else str(table)[6:]
    name = "-".join([str(dtype)[6:], divergence, str(columns), tail, *odd, *others])
    return Variant(name, _sparse, arguments, everyday)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_WITH_PROTOTYPES = [name for name in KINDS if name != "logit_mse"]
VARIANTS = [
    _variant(_BF16, 128256, "forward_kl", None, True),
    _variant(_BF16, 50257, "forward_kl", None, True),
    _variant(_BF16, 128256, "forward_kl", _BF16, True),
    _variant(_BF16, 128256, "jsd", _BF16, True),
    *(_variant(dtype, columns, "soft_ce", None) for dtype in (_FP16, _FP32) for columns in (1000, 2000, 32000, 50257)),
    *(_variant(_BF16, 128256, name, _FP32) for name in _WITH_PROTOTYPES),
    *(_variant(_FP32, 50257, name, _BF16) for name in _WITH_PROTOTYPES),
    *(_variant(_BF16, 128256, "forward_kl", table, parts=True) for table in (None, _BF16)),
    *(_variant(_BF16, 128256, "forward_kl", table, smoothing=0.1) for table in (None, _BF16)),
    *(_variant(_BF16, 128256, "forward_kl", table, probs=True, smoothing=0.1) for table in (None, _BF16)),
]
