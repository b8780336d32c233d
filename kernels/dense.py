"""``dense_rows`` and its gradient forms: student logits against teacher logits, CE and z-loss in the same sweeps."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast._calls import DenseCall
from kdfast.kernels.launch import (
    KINDS,
    check_rows,
    constants_of,
    holds_rows,
    launch,
    load_of,
    programs_for,
    row_arguments,
    strides,
    tile_for,
)
from kdfast.kernels.rowmath import INF, LOG2E, Parameters, log_odds, two_classes
from kdfast.kernels.rows import Row, coefficients, load_row, row_offset, store_parts, total
from kdfast.kernels.softmax import Link, Scale, Softmax, best_of, entropy, origin_of
from kdfast.kernels.statistics import ZScores, moments, statistics, statistics_of_held
from kdfast.kernels.sweeps import (
    Backward,
    Ground,
    Weights,
    elements,
    first_value,
    gradient,
    gradient_beyond,
    gradient_of_held,
    settle,
)
from kdfast.kernels.targets import label_of, slopes_of, softmax_beyond, truth_of
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "dense_rows"]


@triton.jit
def _z_scores(at, STANDARDIZE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    z = ZScores(0.0, 1.0, 1.0, 0.0, 1.0)
    if STANDARDIZE:
        mean_s, inverse_s, count_s = moments(at.student, at.bound_t, BLOCK, WIDTH)
        mean_t, inverse_t, _ = moments(at.teacher, at.bound_t, BLOCK, WIDTH)
        z = ZScores(mean_s, inverse_s, count_s, mean_t, inverse_t)
    return z


@triton.jit
def _scale(c, z, FAMILY: tl.constexpr, STANDARDIZE: tl.constexpr):
    """Standardized logits are logits at another temperature; a constant row's differences are 0 at any."""
    bits_s, bits_t = LOG2E / c.tau_s, LOG2E / c.tau_t
    if STANDARDIZE:
        bits_s *= tl.where(z.inverse_s == 0.0, 1.0, z.inverse_s)
        bits_t *= tl.where(z.inverse_t == 0.0, 1.0, z.inverse_t)
    if FAMILY == "mse":
        bits_s = bits_s * 0.0 + LOG2E
    squared = bits_s == 0.5 * LOG2E
    has_truth = (c.ce != 0.0) | (c.z != 0.0)
    return Scale(bits_s, bits_t, squared, has_truth & (bits_s != LOG2E) & (bits_s != 0.5 * LOG2E))


@triton.jit
def _link(s):
    """Probabilities from the first sweep's sums; 1 where a side has none, whose weights are all 0."""
    dead = (s.z_s == 0.0) | (s.z_t == 0.0)
    z_s, z_t = tl.where(dead, 1.0, s.z_s), tl.where(dead, 1.0, s.z_t)
    return dead, Link(s.top_s, s.top_t, 1.0 / z_s, 1.0 / z_t, -tl.log(z_s), -tl.log(z_t), tl.log(z_s / z_t))


@triton.jit
def _divergence(
    at,
    s,
    scale,
    c,
    x_label,
    y_label,
    by,
    factor,
    KIND: tl.constexpr,
    FAMILY: tl.constexpr,
    CASE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(value, Link, Weights) of a row, from its first sweep's sums."""
    dead, link = _link(s)
    kd, zero = c.kd * factor / c.tau_s, c.kd * 0.0
    student, teacher, target, mean, both = kd * link.q, kd * link.p, zero, zero, zero
    if KIND == "dkd":
        u, v = (x_label - origin_of(s.top_s)) * scale.student, (y_label - origin_of(s.top_t)) * scale.teacher
        value, gap = two_classes(log_odds(u, s.z_s), log_odds(v, s.z_t))
        value = by.a * value + tl.where(dead, 0.0, by.b * first_value(s, link, KIND, FAMILY))
        target, rest = kd * by.a * gap, tl.where(dead, 0.0, kd * by.b)
        student, teacher = (rest - target) * link.q, rest * link.p
        dead = ((s.z_s == 0.0) & (x_label == -INF)) | ((s.z_t == 0.0) & (y_label == -INF))
    elif FAMILY == "mse":
        valid = tl.maximum(s.both, 1.0)
        value, kd, dead = s.cross_t / valid, 2.0 * c.kd / valid, s.both == 0.0
    elif FAMILY == "element":
        value, mean = elements(at, link, scale, by, KIND, CASE, "logits", BLOCK, WIDTH)
    else:
        value = first_value(s, link, KIND, FAMILY)
        mean, both = link.q * s.cross_s, link.q * s.both
    if FAMILY != "mse":
        z = s.z_s + s.z_t
        value = tl.where(z != z, float("nan"), value)
    off = dead | (c.kd == 0.0)
    value = tl.where(c.is_bad, float("nan"), tl.where(dead, 0.0, factor * value))
    student, teacher, target = tl.where(off, 0.0, student), tl.where(off, 0.0, teacher), tl.where(off, 0.0, target)
    weights = Weights(tl.where(off, 0.0, kd), student, teacher, mean, both, target, zero, zero)
    return value, link, weights


@triton.jit
def _dense(
    student,
    teacher,
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
    outer_t,
    inner_t,
    outer_g,
    inner_g,
    outer_p,
    inner_p,
    columns,
    shared,
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
    STANDARDIZE: tl.constexpr,
    SMOOTH: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    LABELS: tl.constexpr = label is not None
    PARTS: tl.constexpr = parts is not None
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    by = Parameters(a, b, rest, minus_log_a, minus_log_rest)
    for turn in range(1 if HELD else tl.cdiv(rows - tl.program_id(0), step)):
        row = first + turn * step
        c = coefficients(coef, row, rows, True, LABELS or probs is not None)
        x_row = student + row_offset(row, inner, outer_s, inner_s)
        y_row = teacher + row_offset(row, inner, outer_t, inner_t)
        p_row = probs
        if probs is not None:
            p_row = probs + row_offset(row, inner, outer_p, inner_p)
        target, x_label, has_label = -1, -INF, False
        if LABELS:
            target, x_label, has_label = label_of(label, row, x_row, columns, c.counts)
        # A row that does not count is not read, nor is the teacher's where the divergence does not.
        bound = tl.where(c.counts, shared, 0)
        bound_kd = tl.where(c.kd != 0.0, shared, 0)
        bound_t = bound if PARTS else bound_kd
        at = Row(x_row, y_row, p_row, None, bound, bound_t, target)
        held = None
        if HELD:
            held = load_row(at, KIND, HELD, BLOCK, WIDTH)
        at = Row(x_row, y_row, p_row, None, bound, bound_t, target, held)
        z = _z_scores(at, STANDARDIZE, BLOCK, WIDTH)
        scale = _scale(c, z, FAMILY, STANDARDIZE)
        if HELD:
            s, labelled = statistics_of_held(at, scale, z, KIND, FAMILY, HELD, BLOCK // WIDTH)
        else:
            s, labelled = statistics(at, scale, z, KIND, FAMILY, "logits", SMOOTH, BLOCK, WIDTH)
        # dkd's target, which the sweeps leave out.
        target_logit = tl.full((), -INF, tl.float32)
        if KIND == "dkd":
            target_logit = tl.where(target < shared, x_label, -INF)
        whole = Row(x_row, y_row, p_row, None, tl.where(c.counts, columns, 0), 0, target)
        apart = Softmax(target_logit, 1.0)
        one, beyond = Softmax(s.top_s, s.z_one), labelled
        if not HELD:
            one, beyond = softmax_beyond(one, labelled, whole, shared, SMOOTH, BLOCK, WIDTH)
        one, truth = truth_of(one, beyond, probs, apart, c, x_label, has_label, smoothing, SMOOTH)
        y_label = -INF
        if KIND == "dkd":
            y_label = tl.load(y_row + target, mask=has_label & (target < bound_t), other=-INF).to(tl.float32)
        at = Row(x_row, y_row, p_row, None, bound_t, bound_t, target, held)
        value, link, weights = _divergence(
            at, s, scale, c, x_label, y_label, by, factor, KIND, FAMILY, CASE, BLOCK, WIDTH
        )
        if KIND == "dkd":
            value = tl.where(has_label & (target < shared), value, float("nan"))
        result = total(c, value, truth)
        tl.store(loss + row, result)
        if PARTS:
            ce = truth.ce
            if LABELS:
                ce = tl.where(has_label, ce, 0.0)
            elif probs is None:
                ce = 0.0
            agree = best_of(x_row, bound, BLOCK, WIDTH).column == best_of(y_row, bound, BLOCK, WIDTH).column
            store_parts(parts, row, rows, c.counts, value, ce, entropy(x_row, bound, c.bits, BLOCK, WIDTH), agree)
        if grad is not None:
            g_row = grad + row_offset(row, inner, outer_g, inner_g)
            at = Row(x_row, y_row, p_row, None, bound, bound_kd, target, held)
            if STANDARDIZE:
                weights = settle(at, link, weights, scale, z, by, KIND, FAMILY, CASE, BLOCK, WIDTH)
            slope, at_column = slopes_of(one, truth, x_label, KIND == "dkd")
            poison = tl.where(result != result, float("nan"), 0.0)
            ground = Ground(slope, truth.share, truth.label, target, -truth.label, poison)
            if not HELD:
                gradient_beyond(g_row, shared, columns, whole, one.top, ground, LABELS, BLOCK, WIDTH)
            # The shared columns' exponentials have an origin of their own.
            down = tl.exp2((origin_of(link.top_s) - origin_of(one.top)) * LOG2E)
            ground = Ground(slope * down, truth.share, truth.label, target, at_column, poison)
            backward = Backward(at, link, weights, scale, z, by, ground)
            if HELD:
                gradient_of_held(g_row, shared, backward, KIND, FAMILY, LABELS, HELD, BLOCK, WIDTH)
            else:
                gradient(g_row, shared, backward, KIND, FAMILY, CASE, "logits", STANDARDIZE, LABELS, BLOCK, WIDTH)


def _arguments(student: Tensor, grad: Tensor | None, call: DenseCall, once: bool) -> tuple[dict[str, Any], int]:
    """(the kernel's, its number of warps among them, and its programs)."""
    check_rows(student=student, teacher=call.teacher, label_probs=call.label_probs)
    rows, columns = student.shape[0] * student.shape[1], student.shape[2]
    constants = {
        **constants_of(call.kind, call.a, call.b),
        "STANDARDIZE": call.standardize,
        "SMOOTH": call.smoothing != 0.0,
    }
    read = student, call.teacher, call.label_probs, grad
    load = load_of(constants, columns, call.label_probs is not None, *read)
    load = "held" if once and holds_rows(student, call, constants, load) else load
    shape, width = tile_for(load, columns, student, call.teacher)
    given = {
        **row_arguments(student, grad, call),
        "teacher": call.teacher,
        **strides("t", call.teacher),
        "shared": min(columns, call.teacher.shape[2]),
        **constants,
        "HELD": shape.tiles,
        "BLOCK": shape.block,
        "WIDTH": width,
        **shape.options(),
    }
    return given, rows if shape.tiles else programs_for(rows, student.device, shape.programs)


def dense_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, rows) parts of ``torch.ops.kdfast.dense_rows``' arguments.

    The gradient of the losses' sum goes to ``grad``, which may be the student's own memory.
    """
    # Nobody has run that on a GPU; until then it is not the default.
    once = os.environ.get("KDFAST_GPU") == "once"
    return launch(_dense, *_arguments(student, grad, DenseCall(*arguments), once))


def _variant(
    student: torch.dtype, teacher: torch.dtype, columns: int, divergence: str, everyday: bool = False, **options: Any
) -> Variant:
    """A call's, by its dtypes, vocabulary and divergence; `options` are what it does beside."""
    sides = [torch.empty(64, 64, columns, dtype=dtype, device="meta") for dtype in (student, teacher)]
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    probs = sides[0] if options.get("probs") else None
    coef = torch.empty(5, 4096, device="meta")
    kind, smoothing, standardize = KINDS.index(divergence), options.get("smoothing", 0.0), "standardize" in options
    call = DenseCall(
        sides[1],
        coef,
        None if probs is not None else labels,
        probs,
        smoothing,
        kind,
        options.get("a", 0.5),
        0.25,
        1.0,
        standardize,
        "parts" in options,
    )
    arguments, _ = _arguments(sides[0], sides[0], call, "once" in options)
    width = "odd" if columns % 8 else "aligned"
    said = [f"{key}={value}" for key, value in options.items()]
    name = "-".join([str(student)[6:], str(teacher)[6:], divergence, str(columns), width, *said])
    return Variant.of_call(name, _dense, arguments, everyday)


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
