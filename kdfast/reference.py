"""The oracle: every fused op as plain, slow, obvious PyTorch. It runs in float64, on any device, under autograd.

Each kernel is compared with these functions, gradients first; devices without a kernel run them.

``coef`` is (5, rows): student temperature, teacher temperature, and the coefficients of KD, CE and z-loss, with
row weights, tau^2 and the denominator already in. A zero coefficient takes its term out by selection, never as 0 * inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.divergences import Divergence

__all__ = ["Background", "Labels", "Parts", "background_rows", "dense_rows", "sparse_rows"]


class Labels(NamedTuple):
    """Ground truth: class indices (rows,), or class probabilities (rows, V_s), or neither."""

    target: Tensor | None = None
    probs: Tensor | None = None
    smoothing: float = 0.0


class Parts(NamedTuple):
    """What the sweep knows anyway, (rows,) each, unweighted and without tau^2; 0 in rows that are not counted."""

    kd: Tensor
    ce: Tensor
    entropy: Tensor  # the student's, at its temperature, nats
    top1: Tensor  # 1 where student and teacher agree on the most likely column


def dense_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Labels, divergence: Divergence
) -> tuple[Tensor, Parts]:
    """Per-row loss of (rows, V_s) student logits against (rows, V_t) teacher logits, and its parts."""
    student, teacher = student.to(coef.dtype), teacher.to(coef.dtype)
    vocab = min(student.shape[1], teacher.shape[1])

    def kd(rows: Tensor) -> Tensor:
        s, t = student[rows, :vocab], teacher[rows, :vocab]
        if divergence.standardize:
            s, t = _standardize(s), _standardize(t)
        index = None if labels.target is None else labels.target[rows]
        value = _divergence(s, t, coef[0, rows], coef[1, rows], index, divergence)
        return value * torch.where(_valid(coef[:2, rows]).all(0), 1.0, math.nan)

    s, t = student[:, :vocab], teacher[:, :vocab]
    alive = _has_finite(s) & _has_finite(t)
    return _total(kd, alive, student, coef, labels, s, s.argmax(-1) == t.argmax(-1))


def sparse_rows(
    student: Tensor,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor,
    tail: Tensor | None,
    vocab_t: int,
    coef: Tensor,
    labels: Labels,
    subtract_entropy: bool,
) -> tuple[Tensor, Parts]:
    """Per-row loss against K (id, weight) entries per row and, with ``tail`` (rows,) log-mass, the rest as one class.

    Soft cross-entropy -sum_k w_k log q_k - w_tail log q_tail; ``subtract_entropy`` makes it forward KL.
    """
    student, s = student.to(coef.dtype), student[:, :vocab_t].to(coef.dtype)
    entries = [slice(a, b) for a, b in pairwise(offsets.tolist())]

    def kd_row(i: int) -> Tensor:
        w = weights[entries[i]].to(coef.dtype)
        mass = None if tail is None else tail[i].to(coef.dtype)
        value = _sparse_row(s[i] / coef[0, i], ids[entries[i]].long(), w, mass, subtract_entropy)
        return value * torch.where(_valid(coef[0, i]), 1.0, math.nan)

    def kd(rows: Tensor) -> Tensor:
        values = [kd_row(int(i)) for i in rows.nonzero()]
        return torch.stack(values) if values else student.new_zeros(0)

    tops = [ids[e][weights[e].argmax()] if e.stop > e.start else ids.new_full((), -1) for e in entries]
    top1 = s.argmax(-1) == torch.stack(tops) if tops else torch.zeros(0, dtype=torch.bool, device=s.device)
    return _total(kd, _has_finite(s), student, coef, labels, s, top1)


class Background(NamedTuple):
    """What the tail of a sparse row looks like: a row of a table of non-negative shapes."""

    shape: Tensor  # (rows,) int64, each row's row of `shapes`
    shapes: Tensor  # (S, V_t)


def background_rows(
    student: Tensor,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor,
    tail: Tensor,
    background: Background,
    coef: Tensor,
    labels: Labels,
    divergence: Divergence,
) -> tuple[Tensor, Parts]:
    """Per-row loss against K (id, weight) entries and a tail of (rows,) log-mass spread like a shape.

    The same as against the logits log p of the whole distribution, at teacher temperature 1.
    """
    shared = min(student.shape[1], background.shapes.shape[1])
    rows = [
        _expand(ids[a:b].long(), weights[a:b].to(coef.dtype), tail[i].to(coef.dtype), background, i, shared)
        for i, (a, b) in enumerate(pairwise(offsets.tolist()))
    ]
    p = torch.stack(rows) if rows else student.new_zeros(0, background.shapes.shape[1], dtype=coef.dtype)
    coef = torch.stack([coef[0], torch.ones_like(coef[0]), *coef[2:]])
    return dense_rows(student, p.log(), coef, labels, divergence)


def _expand(ids: Tensor, w: Tensor, tail: Tensor, background: Background, row: int, shared: int) -> Tensor:
    """One row's distribution over the teacher's columns, up to a factor; NaN where an id or a shape is out of range."""
    index, shapes = background.shape[row], background.shapes
    if bool((index < 0) | (index >= shapes.shape[0])) or bool(((ids < 0) | (ids >= shared)).any()):
        return w.new_full((shapes.shape[1],), math.nan)
    rest = shapes[index].to(w.dtype).index_fill(0, ids, 0.0)
    total = rest.sum()
    p = torch.where(total == 0.0, 0.0, tail.exp() / total) * rest
    return p.index_copy(0, ids, w)


def _total(
    kd: Callable[[Tensor], Tensor],
    alive: Tensor,
    student: Tensor,
    coef: Tensor,
    labels: Labels,
    s: Tensor,
    top1: Tensor,
) -> tuple[Tensor, Parts]:
    """Sum of the terms over the rows that count; ``kd`` gives the divergence of the rows a mask selects."""
    finite, counted = _has_finite(student), (coef[2:] != 0.0).any(0)

    def ce(rows: Tensor) -> Tensor:
        return _cross_entropy(student[rows], labels, rows)

    def lse_squared(rows: Tensor) -> Tensor:
        return torch.logsumexp(student[rows], -1).square()

    loss = torch.zeros_like(coef[0])
    for term, weight, exists in zip((kd, ce, lse_squared), coef[2:], (alive, finite, finite), strict=True):
        rows = (weight != 0.0) & exists
        loss = loss + _scatter(rows, weight[rows] * term(rows))
    with torch.no_grad():
        kd_part, ce_part = (_scatter(counted & e, f(counted & e)) for f, e in ((kd, alive), (ce, finite)))
        entropy = torch.where(counted, _entropy(s, coef[0]), 0.0)
        return loss, Parts(kd_part, ce_part, entropy, (counted & top1).to(coef.dtype))


def _scatter(rows: Tensor, values: Tensor) -> Tensor:
    """(rows,) with ``values`` where the mask is set and exact zeros, without a graph, elsewhere."""
    return values.new_zeros(rows.shape).index_put((rows,), values)


# ---- divergences ----------------------------------------------------------------------------------------------------


def _divergence(
    s: Tensor, t: Tensor, tau_s: Tensor, tau_t: Tensor, index: Tensor | None, divergence: Divergence
) -> Tensor:
    div = divergence.canonical()
    if div.name == "logit_mse":
        return _logit_mse(s, t)
    s, t = s / tau_s[:, None], t / tau_t[:, None]
    if div.name == "dkd":
        assert index is not None
        return _dkd(s, t, index, div.a, div.b)
    return _elements(s, t, div).sum(-1)


def _elements(s: Tensor, t: Tensor, div: Divergence) -> Tensor:
    """D's summands per column; +inf where one side's mask makes the divergence infinite."""
    live_s, live_t = s != -math.inf, t != -math.inf
    both, only_s, only_t = live_s & live_t, live_s & ~live_t, live_t & ~live_s
    lq, lp = _log_softmax(s), _log_softmax(t)
    q, p = lq.exp(), lp.exp()
    x, y = lp.masked_fill(~both, 0.0), lq.masked_fill(~both, 0.0)
    d = x - y
    if div.name == "alpha_beta":
        inside = _alpha_beta(x, y, div.a, div.b)
        lone_p, lone_q = _alpha_beta_lone(lp.masked_fill(~only_t, 0.0), lq.masked_fill(~only_s, 0.0), div.a, div.b)
    else:
        inside, lone_p, lone_q = _by_name(p, q, d, y, div)
    zero = torch.zeros_like(s)
    return torch.where(both, inside, torch.where(only_t, lone_p, torch.where(only_s, lone_q, zero)))


def _by_name(p: Tensor, q: Tensor, d: Tensor, lq: Tensor, div: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """(both sides alive, teacher alone alive, student alone alive), with d = log p - log q."""
    inf = torch.full_like(p, math.inf)
    zero = torch.zeros_like(p)
    lam = torch.as_tensor(div.a, dtype=p.dtype, device=p.device)
    if div.name == "forward_kl":
        return p * d, inf, zero
    if div.name == "soft_ce":
        return -p * lq, inf, zero
    if div.name == "reverse_kl":
        return -q * d, zero, inf
    if div.name == "symmetric_kl":
        return 0.5 * (p - q) * d, inf, inf
    if div.name == "tvd":
        return 0.5 * (p - q).abs(), 0.5 * p, 0.5 * q
    if div.name == "skew_forward_kl":
        return -p * _log_mix(lam, -d), -p * lam.log(), zero
    if div.name == "skew_reverse_kl":
        return -q * _log_mix(lam, d), zero, -q * lam.log()
    if div.name == "jsd":
        beta, scale = lam, 1.0 / (div.a * (1.0 - div.a)) if div.normalize else 1.0
        inside = -beta * p * _log_mix(beta, -d) - (1.0 - beta) * q * _log_mix(1.0 - beta, d)
        return scale * inside, -scale * beta * p * beta.log(), -scale * (1.0 - beta) * q * (-beta).log1p()
    raise ValueError(f"no element formula for {div.name}")


def _log_mix(lam: Tensor, d: Tensor) -> Tensor:
    """log(lam + (1 - lam) e^d), which is log(m / x) for the mixture m = lam x + (1 - lam) y with d = log(y / x)."""
    return torch.logaddexp(lam.log().expand_as(d), (-lam).log1p() + d)


def _alpha_beta(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """Alpha-beta summand at log p = x, log q = y, with its limits (Cichocki, Cruces & Amari 2011)."""
    c, d = a + b, x - y
    if a == 0.0 and b == 0.0:
        return 0.5 * d * d
    if b == 0.0:
        return ((a * x).exp() * (a * d - 1.0) + (a * y).exp()) / (a * a)
    if a == 0.0:
        return ((b * x).exp() - (b * y).exp() * (b * d + 1.0)) / (b * b)
    if c == 0.0:
        return ((a * d).exp() - 1.0 - a * d) / (a * a)
    return -((a * x + b * y).exp() - a / c * (c * x).exp() - b / c * (c * y).exp()) / (a * b)


def _alpha_beta_lone(lp: Tensor, lq: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """The summand where q = 0, and where p = 0."""
    c, inf = a + b, torch.full_like(lp, math.inf)
    lone_p = (c * lp).exp() / (b * c) if b > 0.0 and c > 0.0 else inf
    lone_q = (c * lq).exp() / (a * c) if a > 0.0 and c > 0.0 else inf
    return lone_p, lone_q


def _dkd(s: Tensor, t: Tensor, index: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha KL of (target, rest) + beta KL within the rest (Zhao et al. 2022, eq. 7), from log-odds of the target."""
    bad = (index < 0) | (index >= s.shape[1])
    target = torch.nn.functional.one_hot(index.masked_fill(bad, 0), s.shape[1]).bool()
    rest_s, rest_t = s.masked_fill(target, -math.inf), t.masked_fill(target, -math.inf)
    nckd = _elements(rest_s, rest_t, Divergence("forward_kl")).sum(-1)
    nckd = torch.where(_has_finite(rest_s) & _has_finite(rest_t), nckd, 0.0)
    odds_s, odds_t = _log_odds(s[target], rest_s), _log_odds(t[target], rest_t)
    tckd = _binary_kl(odds_t, odds_s)
    return torch.where(bad, math.nan, alpha * tckd + beta * nckd)


def _log_odds(target: Tensor, rest: Tensor) -> Tensor:
    """Of the target against the rest; +inf where nothing else is possible."""
    alone = ~_has_finite(rest)
    return torch.where(alone, math.inf, target - torch.logsumexp(torch.where(alone[:, None], 0.0, rest), -1))


def _binary_kl(odds_p: Tensor, odds_q: Tensor) -> Tensor:
    logsigmoid = torch.nn.functional.logsigmoid
    total = torch.zeros_like(odds_q)
    for sign in (1.0, -1.0):
        lp, lq = logsigmoid(sign * odds_p), logsigmoid(sign * odds_q)
        total = total + torch.where(lp == -math.inf, 0.0, lp.exp() * (lp - lq))
    return total


def _logit_mse(s: Tensor, t: Tensor) -> Tensor:
    valid = (s != -math.inf) & (t != -math.inf)
    gap = torch.where(valid, s, 0.0) - torch.where(valid, t, 0.0)
    return gap.square().sum(-1) / valid.sum(-1).clamp(min=1)


def _standardize(x: Tensor) -> Tensor:
    """z-scores over the finite columns, population standard deviation; a constant row becomes zeros."""
    live = x != -math.inf
    count = live.sum(-1, keepdim=True).clamp(min=1)
    safe = torch.where(live, x, 0.0)
    constant = x.masked_fill(~live, -math.inf).amax(-1) == x.masked_fill(~live, math.inf).amin(-1)
    centred = torch.where(live, safe - safe.sum(-1, keepdim=True) / count, 0.0)
    variance = torch.where(constant[:, None], 1.0, centred.square().sum(-1, keepdim=True) / count)
    return torch.where(live, torch.where(constant[:, None], 0.0, centred / variance.sqrt()), -math.inf)


def _sparse_row(u: Tensor, ids: Tensor, w: Tensor, tail: Tensor | None, subtract_entropy: bool) -> Tensor:
    if bool(((ids < 0) | (ids >= u.shape[0])).any()):
        return (u * math.nan).sum()
    if bool((u == -math.inf).all()):
        return u.new_zeros(())
    lq = _log_softmax(u[None])[0]
    lq_heads, heads = lq[ids], w > 0.0
    loss = torch.where(heads, -w * torch.where(lq_heads == -math.inf, 0.0, lq_heads), 0.0).sum()
    loss = loss + torch.where(heads & (lq_heads == -math.inf), math.inf, 0.0).sum()
    if subtract_entropy:
        loss = loss + torch.where(heads, w * w.clamp(min=torch.finfo(w.dtype).tiny).log(), 0.0).sum()
    if tail is None or bool(tail == -math.inf):
        return loss
    outside = torch.ones_like(u, dtype=torch.bool).index_fill(0, ids, False)
    if not bool((outside & (u != -math.inf)).any()):
        return loss + math.inf
    lq_tail = torch.logsumexp(lq.masked_fill(~outside, -math.inf), -1)
    return loss + tail.exp() * ((tail if subtract_entropy else 0.0) - lq_tail)


# ---- ground truth ---------------------------------------------------------------------------------------------------


def _cross_entropy(z: Tensor, labels: Labels, rows: Tensor) -> Tensor:
    """Cross-entropy at temperature 1 over the student's whole row; smoothing averages over its finite columns."""
    nll = -_log_softmax(z)
    live = z != -math.inf
    finite_nll = nll.masked_fill(~live, 0.0)
    if labels.probs is not None:
        y = labels.probs[rows].to(z.dtype)
        hard = (y * finite_nll + torch.where((y > 0.0) & ~live, math.inf, 0.0)).sum(-1)
    elif labels.target is not None:
        index = labels.target[rows]
        bad = (index < 0) | (index >= z.shape[1])
        hard = nll.gather(1, index.masked_fill(bad, 0)[:, None])[:, 0] * torch.where(bad, math.nan, 1.0)
    else:
        return nll.new_zeros(nll.shape[0])
    if labels.smoothing == 0.0:
        return hard
    smooth = finite_nll.sum(-1) / live.sum(-1)
    return smooth if labels.smoothing == 1.0 else (1.0 - labels.smoothing) * hard + labels.smoothing * smooth


# ---- small things ---------------------------------------------------------------------------------------------------


def _log_softmax(x: Tensor) -> Tensor:
    """log_softmax that leaves rows without a finite column at -inf, with zero gradient."""
    dead = (x == -math.inf).all(-1, keepdim=True)
    return torch.where(dead, x, torch.log_softmax(torch.where(dead, 0.0, x), -1))


def _has_finite(x: Tensor) -> Tensor:
    """Rows that are not -inf throughout (NaN and +inf count: they must propagate)."""
    return ~(x == -math.inf).all(-1)


def _valid(tau: Tensor) -> Tensor:
    return (tau > 0.0) & (tau < math.inf)


def _entropy(s: Tensor, tau: Tensor) -> Tensor:
    lq = _log_softmax(s / tau[:, None])
    return -(lq.exp() * lq.masked_fill(lq == -math.inf, 0.0)).sum(-1)
