"""``dense_rows`` and its gradient forms: student logits against teacher logits, cross-entropy and z-loss beside them.

A row is swept twice, for its statistics and for its gradient, and a third time in between where the divergence needs
probabilities before it can be summed. Where a cluster of thread blocks holds the row, it is read once.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast._calls import KINDS, DenseCall
from kdfast.kernels.launch import (
    check_rows,
    cost_of_column,
    launch,
    programs_for,
    row_arguments,
    spec_of,
    supports_one_read,
    tile_for,
)
from kdfast.kernels.rowmath import INF, LOG2E, log_odds, two_classes
from kdfast.kernels.rows import Row, Sizes, load_row, loss_of, row_pointer, strided, with_bounds
from kdfast.kernels.softmax import Softmax, SoftmaxStats, Temperatures, argmax, origin_of, store_parts
from kdfast.kernels.statistics import no_zscores, statistics, statistics_on_chip, zscores_of
from kdfast.kernels.sweeps import (
    Backward,
    Weights,
    elements,
    gradient,
    gradient_on_chip,
    gradient_student_only,
    settle,
    value_of_sums,
)
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

__all__ = ["VARIANTS", "dense_rows"]


# ---- statistics ------------------------------------------------------------------------------------------------------


@triton.jit
def _temperatures(c, zscores, spec):
    """Standardized logits are logits at another temperature; a constant row's differences are 0 at any."""
    scale_log2_s, scale_log2_t = LOG2E / c.tau_s, LOG2E / c.tau_t
    if spec.STANDARDIZE:
        scale_log2_s *= tl.where(zscores.inverse_s == 0.0, 1.0, zscores.inverse_s)
        scale_log2_t *= tl.where(zscores.inverse_t == 0.0, 1.0, zscores.inverse_t)
    if spec.FAMILY == "mse":
        scale_log2_s = scale_log2_s * 0.0 + LOG2E
    squared = scale_log2_s == 0.5 * LOG2E
    has_terms = (c.ce != 0.0) | (c.z_weight != 0.0)
    separate = has_terms & (scale_log2_s != LOG2E) & (scale_log2_s != 0.5 * LOG2E)
    return Temperatures(scale_log2_s, scale_log2_t, squared, separate)


@triton.jit
def _softmax_stats(s):
    """(whether a side has no finite logit, SoftmaxStats): such a side's weights are all 0."""
    dead = (s.sum_exp_s == 0.0) | (s.sum_exp_t == 0.0)
    sum_s, sum_t = tl.where(dead, 1.0, s.sum_exp_s), tl.where(dead, 1.0, s.sum_exp_t)
    log_norm_q, log_norm_p, gap = -tl.log(sum_s), -tl.log(sum_t), tl.log(sum_s / sum_t)
    return dead, SoftmaxStats(s.row_max_s, s.row_max_t, 1.0 / sum_s, 1.0 / sum_t, log_norm_q, log_norm_p, gap)


@triton.jit
def _statistics(row, tiles, c, spec):
    """(Statistics, TargetSums, Temperatures, ZScores) of a row."""
    zscores = no_zscores()
    if spec.STANDARDIZE:
        zscores = zscores_of(row, spec)
    tau = _temperatures(c, zscores, spec)
    if spec.TILES_ON_CHIP > 0:
        s, sums = statistics_on_chip(tiles, tau, zscores, spec)
    else:
        s, sums = statistics(row, tau, zscores, spec)
    return s, sums, tau, zscores


# ---- value -----------------------------------------------------------------------------------------------------------


@triton.jit
def _divergence(row, s, tau, c, label, y_target, by, spec):
    """(value, SoftmaxStats, Weights) of a row, from its first sweep's sums; ``y_target`` is the teacher's at dkd's."""
    dead, stats = _softmax_stats(s)
    kd, zero = c.kd * by.scale / c.tau_s, c.kd * 0.0
    student, teacher, target, mean, both = kd * stats.norm_q, kd * stats.norm_p, zero, zero, zero
    if spec.KIND == "dkd":
        u = (label.logit - origin_of(s.row_max_s)) * tau.scale_log2_s
        v = (y_target - origin_of(s.row_max_t)) * tau.scale_log2_t
        value, gap = two_classes(log_odds(u, s.sum_exp_s), log_odds(v, s.sum_exp_t))
        rest = tl.where(dead | (by.b == 0.0), 0.0, by.b * value_of_sums(s, stats, spec))
        # A term of weight 0 is left out: it may be infinite.
        value = tl.where(by.a == 0.0, 0.0, by.a * value) + rest
        target, rest = kd * by.a * gap, tl.where(dead, 0.0, kd * by.b)
        student, teacher = (rest - target) * stats.norm_q, rest * stats.norm_p
        dead = ((s.sum_exp_s == 0.0) & (label.logit == -INF)) | ((s.sum_exp_t == 0.0) & (y_target == -INF))
    elif spec.FAMILY == "mse":
        valid = tl.maximum(s.both, 1.0)
        value, kd, dead = s.cross_t / valid, 2.0 * c.kd / valid, s.both == 0.0
    elif spec.FAMILY == "element":
        value, mean = elements(row, stats, tau, by, spec)
    else:
        value = value_of_sums(s, stats, spec)
        mean, both = stats.norm_q * s.cross_s, stats.norm_q * s.both
    if spec.FAMILY != "mse":
        sums = s.sum_exp_s + s.sum_exp_t
        value = tl.where(sums != sums, float("nan"), value)
    off = dead | (c.kd == 0.0)
    value = tl.where(c.is_bad, float("nan"), tl.where(dead, 0.0, by.scale * value))
    student, teacher, target = tl.where(off, 0.0, student), tl.where(off, 0.0, teacher), tl.where(off, 0.0, target)
    return value, stats, Weights(tl.where(off, 0.0, kd), student, teacher, mean, both, target, zero, zero)


# ---- gradient --------------------------------------------------------------------------------------------------------


@triton.jit
def _write_gradient(to, sizes, student_only, tiles, back, softmax_tau1, label, spec):
    """Writes the row's gradient, the student's lone columns first."""
    targets, weights = back.targets, back.weights
    if spec.STANDARDIZE:
        weights = settle(back, spec)
    at_column = targets.at_column
    if spec.KIND == "dkd":
        at_column = at_left_out_label(targets, softmax_tau1, label.logit)
    if spec.TILES_ON_CHIP == 0:
        row_max = softmax_tau1.row_max
        gradient_student_only(to, sizes.shared, sizes.columns, student_only, row_max, targets, spec)
    targets = with_origin(targets, softmax_tau1, back.stats.row_max_s, at_column)
    back = Backward(back.row, back.stats, weights, back.tau, back.zscores, back.by, targets)
    if spec.TILES_ON_CHIP > 0:
        gradient_on_chip(to, sizes.shared, tiles, back, spec)
    else:
        gradient(to, sizes.shared, back, spec)


# ---- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _dense_row(row_id, student, teacher, grad, targets, coef, results, sizes, by, spec):
    """Computes one row."""
    c, logits, probs, label = open_row(row_id, student, targets, coef, sizes, spec)
    teacher = row_pointer(teacher, row_id, sizes.inner)
    # A row that does not count is not read, nor is the teacher's where the divergence does not.
    bound, bound_kd = tl.where(c.counts, sizes.shared, 0), tl.where(c.kd != 0.0, sizes.shared, 0)
    bound_t = bound if results.parts is not None else bound_kd
    row = Row(logits, teacher, probs, logits, bound, bound_t, label.column)
    student_only = with_bounds(row, tl.where(c.counts, sizes.columns, 0), 0)
    tiles = ()
    if spec.TILES_ON_CHIP > 0:
        tiles = load_row(row, spec)

    s, sums, tau, zscores = _statistics(row, tiles, c, spec)
    softmax_tau1 = Softmax(s.row_max_s, s.sum_exp_tau1)
    if spec.TILES_ON_CHIP == 0:
        softmax_tau1, sums = add_student_only(softmax_tau1, sums, student_only, sizes.shared, spec)
    # dkd's target, which the sweeps leave out.
    x_target, y_target = tl.full((), -INF, tl.float32), -INF
    if spec.KIND == "dkd":
        x_target = tl.where(label.column < sizes.shared, label.logit, -INF)
        inside = label.found & (label.column < bound_t)
        y_target = tl.load(teacher + label.column, mask=inside, other=-INF).to(tl.float32)
    left_out = Softmax(x_target, 1.0)
    softmax_tau1, terms = target_terms(softmax_tau1, sums, left_out, c, label, targets.smoothing, spec)

    kd, stats, weights = _divergence(with_bounds(row, bound_t, bound_t), s, tau, c, label, y_target, by, spec)
    if spec.KIND == "dkd":
        kd = tl.where(label.found & (label.column < sizes.shared), kd, float("nan"))
    loss = loss_of(c, kd, terms)
    tl.store(results.loss + row_id, loss)
    if results.parts is not None:
        ce, column_t = known_cross_entropy(terms, label, spec), argmax(teacher, bound, spec).column
        store_parts(results.parts, row_id, sizes.rows, row, c, kd, ce, column_t, spec)
    if grad is not None:
        of_targets = target_gradient(softmax_tau1, terms, label, loss)
        back = Backward(with_bounds(row, bound, bound_kd), stats, weights, tau, zscores, by, of_targets)
        to = row_pointer(grad, row_id, sizes.inner)
        _write_gradient(to, sizes, student_only, tiles, back, softmax_tau1, label, spec)


@triton.jit
def _dense(student, teacher, grad, targets, coef, results, sizes, by, spec):
    """Every n-th row of n programs; where a cluster holds a row, one row a program."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for turn in range(1 if spec.TILES_ON_CHIP else tl.cdiv(sizes.rows - tl.program_id(0), step)):
        _dense_row(first + turn * step, student, teacher, grad, targets, coef, results, sizes, by, spec)


# ---- launch ----------------------------------------------------------------------------------------------------------


def _arguments(student: Tensor, grad: Tensor | None, call: DenseCall, one_read: bool) -> tuple[dict[str, Any], int]:
    """(the kernel's arguments and options, programs); ``one_read``: rows are read once where that is possible."""
    check_rows(student=student, teacher=call.teacher, label_probs=call.label_probs)
    outer, inner, columns = student.shape
    cost = cost_of_column(call, call.standardize, student, call.teacher, call.label_probs, grad)
    cost = "on_chip" if one_read and supports_one_read(student, call, cost) else cost
    tile, width = tile_for(cost, columns, student, call.teacher)
    arguments = {
        **row_arguments(student, grad, call),
        "teacher": strided(call.teacher),
        "sizes": Sizes(outer * inner, inner, columns, min(columns, call.teacher.shape[2])),
        "spec": spec_of(call, tile, width, "logits", standardize=call.standardize),
        **tile.options(),
    }
    return arguments, outer * inner if tile.tiles else programs_for(outer * inner, student.device, tile.programs)


def dense_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The losses of student rows against teacher rows, and their gradient.

    Args:
        student: (outer, inner, vocabulary) bfloat16, float16 or float32, of unit stride along the vocabulary.
        grad: like ``student``, where the gradient of the losses' sum goes; it may be the student's own memory. None:
            no gradient is wanted.
        arguments: the others of ``torch.ops.kdfast.dense_rows``, which ``kdfast._calls.DenseCall`` names.

    Returns:
        (rows,) float32 losses, and (4, rows) float32 parts, (4, 0) where the call does not want them.

    Raises:
        ValueError: a tensor of another size, dtype or layout than the kernel reads.
    """
    # Reading rows once has not been timed on a GPU; until then it is not the default.
    one_read = os.environ.get("KDFAST_GPU") == "once"
    return launch(_dense, *_arguments(student, grad, DenseCall(*arguments), one_read))


# ---- forms that are compiled ahead of time ---------------------------------------------------------------------------


def _variant(
    student: torch.dtype, teacher: torch.dtype, columns: int, divergence: str, everyday: bool = False, **options: Any
) -> Variant:
    """The form of a call, by its dtypes, vocabulary and divergence, and by what it does besides."""
    sides = [torch.empty(64, 64, columns, dtype=dtype, device="meta") for dtype in (student, teacher)]
    label = torch.empty(4096, dtype=torch.int64, device="meta")
    call = DenseCall(
        teacher=sides[1],
        coef=torch.empty(5, 4096, device="meta"),
        label=None if options.get("probs") else label,
        label_probs=sides[0] if options.get("probs") else None,
        smoothing=options.get("smoothing", 0.0),
        kind=KINDS.index(divergence),
        a=options.get("a", 0.5),
        b=0.25,
        scale=1.0,
        standardize="standardize" in options,
        want_parts="parts" in options,
    )
    arguments, _ = _arguments(sides[0], sides[0], call, "once" in options)
    width = "odd" if columns % 8 else "aligned"
    others = [f"{key}={value}" for key, value in options.items()]
    name = "-".join([str(student)[6:], str(teacher)[6:], divergence, str(columns), width, *others])
    return Variant(name, _dense, arguments, everyday)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS = [
    _variant(_BF16, _BF16, 128256, "forward_kl", True),
    _variant(_FP32, _FP32, 128256, "forward_kl", True),
    _variant(_BF16, _BF16, 50257, "forward_kl", True),
    _variant(_BF16, _BF16, 128256, "jsd", True),
    *(_variant(_BF16, _BF16, 128256, name) for name in KINDS if name not in ("forward_kl", "jsd")),
    *(_variant(_FP32, _FP32, 50257, name) for name in KINDS),
    *(
        _variant(_FP16, _FP16, columns, name)
        for name in ("forward_kl", "jsd")
        for columns in (1000, 2000, 32000, 50257)
    ),
    *(_variant(_BF16, _FP32, columns, name) for name in ("forward_kl", "jsd") for columns in (128256, 50257)),
    *(_variant(_BF16, _BF16, 128256, name, standardize=True) for name in KINDS),
    *(_variant(_BF16, _BF16, 128256, name, parts=True) for name in ("forward_kl", "reverse_kl", "jsd")),
    *(_variant(_BF16, _BF16, 128256, name, smoothing=0.1) for name in ("forward_kl", "reverse_kl", "jsd")),
    *(_variant(_BF16, _BF16, 128256, "forward_kl", probs=True, smoothing=s) for s in (0.0, 0.1)),
    *(_variant(_BF16, _BF16, 128256, name, a=0.9) for name in ("jsd", "skew_forward_kl", "skew_reverse_kl")),
    *(_variant(_BF16, _BF16, 128256, "alpha_beta", a=a) for a in (0.0, -0.25)),
    _variant(_BF16, _BF16, 128256, "forward_kl", True, once=True),
    *(_variant(_BF16, _BF16, columns, "forward_kl", once=True) for columns in (8000, 32000, 151936)),
    *(_variant(dtype, dtype, 128256, "soft_ce", once=True) for dtype in (_BF16, _FP16, _FP32)),
]
