"""The oracle: every fused op as plain, slow, obvious PyTorch. It runs in float64, on any device, under autograd.

Each kernel is compared with these functions, gradients first; devices without a kernel run them.

``coef`` is (5, rows): student temperature, teacher temperature, and the coefficients of KD, CE and z-loss, with
row weights, tau^2 and the denominator already in. A zero coefficient takes its term out by selection, never as 0 * inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.labels.entries import Entries
from kdfast.loss.vocabulary import WHOLE, Vocabulary

__all__ = ["BY_INDEX", "BY_VALUE", "Parts", "Selection", "TailPrototypes", "Targets", "dense_rows", "sparse_rows"]


class Targets(NamedTuple):
    """Ground truth: class indices, or class probabilities, or neither; and the label smoothing."""

    label: Tensor | None = None  # (rows,) int64
    probs: Tensor | None = None  # (rows, V_s); (outer, inner, V_s) as an op takes them
    smoothing: float = 0.0

    def of_rows(self, rows: slice | Tensor) -> Targets:
        """The targets of some rows, whose probabilities are (rows, V_s)."""
        label, probs = (None if x is None else x[rows] for x in (self.label, self.probs))
        return Targets(label, probs, self.smoothing)


class Parts(NamedTuple):
    """By-products of the losses, (rows,) each, unweighted and without tau^2; 0 in rows that are not counted."""

    kd: Tensor
    ce: Tensor
    entropy: Tensor  # the student's, at its temperature, nats
    top1: Tensor  # 1 where student and teacher agree on the most likely column


class ByIndex:
    """The rows that a (rows,) mask selects, taken out. Nothing of the others can reach a loss or a gradient."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def of(self, x: Tensor, harmless: float = 0.0) -> Tensor:
        """The selected rows of ``x``."""
        return x[self.mask]

    def entries(self, entries: Entries) -> Entries:
        return entries.of_rows(self.mask)

    def put(self, values: Tensor) -> Tensor:
        """(rows,) with the selected rows' ``values``, and exact zeros, without a graph, elsewhere."""
        return values.new_zeros(self.mask.shape).index_put((self.mask,), values)


class ByValue(ByIndex):
    """All rows, where those that a mask does not select have become harmless numbers before anything is done to them.

    Shapes do not depend on values then, as ``torch.func.vmap`` and ``torch.compile`` want it.
    """

    def of(self, x: Tensor, harmless: float = 0.0) -> Tensor:
        return torch.where(self.mask.view(-1, *(1,) * (x.dim() - 1)), x, harmless)

    def entries(self, entries: Entries) -> Entries:
        return entries._replace(weight=torch.where(self.mask[entries.row], entries.weight, 0.0))

    def put(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0.0)


Selection = type[ByIndex]
BY_INDEX, BY_VALUE = ByIndex, ByValue


def dense_rows(
    student: Tensor,
    teacher: Tensor,
    coef: Tensor,
    targets: Targets,
    divergence: Divergence,
    v: Vocabulary = WHOLE,
    select: Selection = BY_INDEX,
) -> tuple[Tensor, Parts]:
    """Per-row loss of (rows, V_s) student logits against (rows, V_t) teacher logits, and its parts."""
    student, teacher = student.to(coef.dtype), teacher.to(coef.dtype)
    vocab = min(student.shape[1], teacher.shape[1])

    def kd(rows: ByIndex) -> Tensor:
        s, t = rows.of(student[:, :vocab]), rows.of(teacher[:, :vocab])
        if divergence.standardize:
            s, t = _standardize(s, v), _standardize(t, v)
        index = None if targets.label is None else rows.of(targets.label, 0)
        tau_s, tau_t = rows.of(coef[0], 1.0), rows.of(coef[1], 1.0)
        value = _divergence(s, t, tau_s, tau_t, index, divergence, v)
        return value * torch.where(_valid(tau_s) & _valid(tau_t), 1.0, math.nan)

    s, t = student[:, :vocab], teacher[:, :vocab]
    alive = _has_finite(s, v) & _has_finite(t, v)
    return _total(kd, alive, student, coef, targets, s, v.argmax(s) == v.argmax(t), v, select)


class TailPrototypes(NamedTuple):
    """What the tail of a sparse row looks like: a row of a table of non-negative prototypes."""

    prototype_ids: Tensor  # (rows,) int64, each row's row of `prototypes`
    prototypes: Tensor  # (S, V_t)


def sparse_rows(
    student: Tensor,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor,
    tail: Tensor | None,
    vocab: int,
    tail_prototypes: TailPrototypes | None,
    coef: Tensor,
    targets: Targets,
    divergence: Divergence,
    v: Vocabulary = WHOLE,
    select: Selection = BY_INDEX,
) -> tuple[Tensor, Parts]:
    """Per-row loss against K (id, weight) entries per row of a teacher of ``vocab`` columns, and its parts.

    An entry of weight 0 is padding: whatever its id, it is as if it were not there.

    With ``tail``, (rows,) log-mass, and prototypes: the loss against the logits log p of the whole distribution, at
    teacher temperature 1. Without prototypes the tail is one more class: soft cross-entropy is then
    -sum_k w_k log q_k - w_tail log q_tail, and forward KL that less the teacher's entropy. Those two are served alone.
    """
    entries = Entries.of(ids, weights.to(coef.dtype), offsets)
    entries = entries.where(entries.weight != 0.0)
    tail = None if tail is None else tail.to(coef.dtype)
    if tail is not None and tail_prototypes is not None:
        p = _expand(entries, tail, tail_prototypes, student.shape[1], v)
        coef = torch.stack([coef[0], torch.ones_like(coef[0]), *coef[2:]])
        return dense_rows(student, p.log(), coef, targets, divergence, v, select)
    student, s = student.to(coef.dtype), student[:, :vocab].to(coef.dtype)
    subtract_entropy = divergence.name == "forward_kl"

    def kd(rows: ByIndex) -> Tensor:
        mass, tau = None if tail is None else rows.of(tail), rows.of(coef[0], 1.0)
        value = _entry_divergence(rows.of(s) / tau[:, None], rows.entries(entries), mass, subtract_entropy, v)
        return value * torch.where(_valid(tau), 1.0, math.nan)

    return _total(kd, _has_finite(s, v), student, coef, targets, s, v.argmax(s) == entries.best(len(s)), v, select)


def _expand(entries: Entries, tail: Tensor, tail_prototypes: TailPrototypes, columns: int, v: Vocabulary) -> Tensor:
    """Distributions over the teacher's columns, up to a factor; NaN where an id or a prototype is out of range."""
    index, prototypes = tail_prototypes
    missing = (index < 0) | (index >= prototypes.shape[0])
    last = prototypes.shape[1] if v.columns is None else v.first + columns
    rest = prototypes[index.masked_fill(missing, 0), v.first : last].to(tail.dtype)
    row, column, w = entries
    outside = (column < 0) | (column >= (v.columns or min(columns, prototypes.shape[1])))
    bad = missing.index_put((row[outside],), missing.new_ones(()))
    here = (column >= v.first) & (column < last)
    place = row[here], column[here] - v.first
    rest = rest.index_put(place, rest.new_zeros(()))
    total = v.sum(rest)
    p = torch.where(total == 0.0, 0.0, tail.exp() / total)[:, None] * rest
    return torch.where(bad[:, None], math.nan, p.index_put(place, w[here]))


def _total(
    kd: Callable[[ByIndex], Tensor],
    alive: Tensor,
    student: Tensor,
    coef: Tensor,
    targets: Targets,
    s: Tensor,
    top1: Tensor,
    v: Vocabulary,
    select: Selection,
) -> tuple[Tensor, Parts]:
    """Sum of the terms over the rows that count; ``kd`` gives the divergence of the rows that are selected."""
    finite, counted = _has_finite(student, v), (coef[2:] != 0.0).any(0)

    def ce(rows: ByIndex) -> Tensor:
        return _cross_entropy(rows.of(student), targets, rows, v)

    def lse_squared(rows: ByIndex) -> Tensor:
        return v.logsumexp(rows.of(student)).square()

    loss = torch.zeros_like(coef[0])
    for term, weight, exists in zip((kd, ce, lse_squared), coef[2:], (alive, finite, finite), strict=True):
        rows = select((weight != 0.0) & exists)
        loss = loss + rows.put(rows.of(weight) * term(rows))
    with torch.no_grad():
        kd_part, ce_part = (
            rows.put(f(rows)) for f, rows in ((kd, select(counted & alive)), (ce, select(counted & finite)))
        )
        entropy = torch.where(counted, _entropy(s, coef[0], v), 0.0)
        return loss, Parts(kd_part, ce_part, entropy, (counted & top1).to(coef.dtype))


# ---- divergences ----------------------------------------------------------------------------------------------------


def _divergence(
    s: Tensor, t: Tensor, tau_s: Tensor, tau_t: Tensor, index: Tensor | None, divergence: Divergence, v: Vocabulary
) -> Tensor:
    div = divergence.canonical()
    if div.name == "logit_mse":
        return _logit_mse(s, t, v)
    s, t = s / tau_s[:, None], t / tau_t[:, None]
    if div.name == "dkd":
        assert index is not None
        return _dkd(s, t, index, div.a, div.b, v)
    return v.sum(_elements(s, t, div, v))


def _elements(s: Tensor, t: Tensor, div: Divergence, v: Vocabulary) -> Tensor:
    """D's summands per column; +inf where one side's mask makes the divergence infinite."""
    live_s, live_t = s != -math.inf, t != -math.inf
    both, only_s, only_t = live_s & live_t, live_s & ~live_t, live_t & ~live_s
    lq, lp = _log_softmax(s, v), _log_softmax(t, v)
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
    if div.name == "squared_hellinger":
        return 0.5 * (p.sqrt() - (0.5 * lq).exp()).square(), 0.5 * p, 0.5 * q
    if div.name == "pearson_chi2":
        return (lq + 2.0 * d).exp() - 2.0 * p + q, inf, q  # p^2 / q - 2 p + q
    if div.name == "neyman_chi2":
        return (lq - d).exp() - 2.0 * q + p, p, inf  # q^2 / p - 2 q + p
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
    """The alpha-beta summand where q = 0, and where p = 0."""
    c, inf = a + b, torch.full_like(lp, math.inf)
    lone_p = (c * lp).exp() / (b * c) if b > 0.0 and c > 0.0 else inf
    lone_q = (c * lq).exp() / (a * c) if a > 0.0 and c > 0.0 else inf
    return lone_p, lone_q


def _dkd(s: Tensor, t: Tensor, index: Tensor, alpha: float, beta: float, v: Vocabulary) -> Tensor:
    """alpha KL of (target, rest) + beta KL within the rest (Zhao et al. 2022, eq. 7), from log-odds of the target."""
    bad = (index < 0) | (index >= (v.columns or s.shape[1]))
    index = index.masked_fill(bad, 0)
    target = v.mask(s, index)
    rest_s, rest_t = s.masked_fill(target, -math.inf), t.masked_fill(target, -math.inf)
    nckd = v.sum(_elements(rest_s, rest_t, Divergence("forward_kl"), v))
    nckd = torch.where(_has_finite(rest_s, v) & _has_finite(rest_t, v), nckd, 0.0)
    odds_s, odds_t = _log_odds(v.pick(s, index), rest_s, v), _log_odds(v.pick(t, index), rest_t, v)
    tckd = _binary_kl(odds_t, odds_s)
    # A term of weight 0 is left out: it may be infinite, and so may its gradient.
    terms = [weight * term for weight, term in ((alpha, tckd), (beta, nckd)) if weight != 0.0]
    return torch.where(bad, math.nan, sum(terms, torch.zeros_like(tckd)))


def _log_odds(target: Tensor, rest: Tensor, v: Vocabulary) -> Tensor:
    """Log-odds of the target against the rest; +inf where nothing else is possible."""
    alone = ~_has_finite(rest, v)
    return torch.where(alone, math.inf, target - v.logsumexp(torch.where(alone[:, None], 0.0, rest)))


def _binary_kl(odds_p: Tensor, odds_q: Tensor) -> Tensor:
    logsigmoid = torch.nn.functional.logsigmoid
    total = torch.zeros_like(odds_q)
    for sign in (1.0, -1.0):
        lp, lq = logsigmoid(sign * odds_p), logsigmoid(sign * odds_q)
        total = total + torch.where(lp == -math.inf, 0.0, lp.exp() * (lp - lq))
    return total


def _logit_mse(s: Tensor, t: Tensor, v: Vocabulary) -> Tensor:
    valid = (s != -math.inf) & (t != -math.inf)
    gap = torch.where(valid, s, 0.0) - torch.where(valid, t, 0.0)
    return v.sum(gap.square()) / v.sum(valid).clamp(min=1)


def _standardize(x: Tensor, v: Vocabulary) -> Tensor:
    """z-scores over the finite columns, population standard deviation; a constant row becomes zeros."""
    live = x != -math.inf
    count = v.sum(live).clamp(min=1)[:, None]
    safe = torch.where(live, x, 0.0)
    constant = v.max(x) == -v.max(-x.masked_fill(~live, math.inf))
    centred = torch.where(live, safe - v.sum(safe)[:, None] / count, 0.0)
    variance = torch.where(constant[:, None], 1.0, v.sum(centred.square())[:, None] / count)
    return torch.where(live, torch.where(constant[:, None], 0.0, centred / variance.sqrt()), -math.inf)


def _entry_divergence(
    u: Tensor, entries: Entries, tail: Tensor | None, subtract_entropy: bool, v: Vocabulary
) -> Tensor:
    lq, (row, column, w) = _log_softmax(u, v), entries
    bad = (column < 0) | (column >= (v.columns or u.shape[1]))
    here = (column >= v.first) & (column < v.first + u.shape[1])
    place, heads = (row[here], column[here] - v.first), w > 0.0
    taken = torch.zeros_like(u, dtype=torch.bool).index_put(place, heads.new_ones(()))
    found, w_here = lq[place], torch.where(heads[here], w[here], 0.0)
    cross = torch.where(heads[here], -w_here * torch.where(found == -math.inf, 0.0, found), 0.0)
    cross = cross + torch.where(heads[here] & (found == -math.inf), math.inf, 0.0)
    loss = v.total(u.new_zeros(len(u)).index_add(0, row[here], cross))
    if subtract_entropy:
        known = torch.where(heads, w * w.clamp(min=torch.finfo(w.dtype).tiny).log(), 0.0)
        loss = loss + u.new_zeros(len(u)).index_add(0, row, known)
    loss = loss + u.new_zeros(len(u)).index_add(0, row, torch.where(bad, math.nan, 0.0).to(u.dtype))
    if tail is None:
        return loss
    rest = lq.masked_fill(taken, -math.inf)
    empty = ~_has_finite(rest, v)
    lq_tail = torch.where(empty, -math.inf, v.logsumexp(torch.where(empty[:, None], 0.0, rest)))
    some = tail > -math.inf
    value = torch.where(some, tail, 0.0).exp() * ((tail if subtract_entropy else 0.0) - lq_tail)
    return loss + torch.where(some, torch.where(empty, math.inf, value), 0.0)


# ---- ground truth ---------------------------------------------------------------------------------------------------


def _cross_entropy(logits: Tensor, targets: Targets, rows: ByIndex, v: Vocabulary) -> Tensor:
    """Cross-entropy at temperature 1 over the student's whole row; smoothing averages over its finite columns."""
    nll = -_log_softmax(logits, v)
    live = logits != -math.inf
    finite_nll = nll.masked_fill(~live, 0.0)
    if targets.probs is not None:
        y = rows.of(targets.probs).to(logits.dtype)
        hard = v.sum(y * finite_nll + torch.where((y > 0.0) & ~live, math.inf, 0.0))
    elif targets.label is not None:
        index = rows.of(targets.label, 0)
        bad = (index < 0) | (index >= (v.columns or logits.shape[1]))
        hard = v.pick(nll, index.masked_fill(bad, 0)) * torch.where(bad, math.nan, 1.0)
    else:
        return nll.new_zeros(nll.shape[0])
    if targets.smoothing == 0.0:
        return hard
    smooth = v.sum(finite_nll) / v.sum(live)
    return smooth if targets.smoothing == 1.0 else (1.0 - targets.smoothing) * hard + targets.smoothing * smooth


# ---- small things ---------------------------------------------------------------------------------------------------


def _log_softmax(x: Tensor, v: Vocabulary) -> Tensor:
    """log_softmax that leaves rows without a finite column at -inf, with zero gradient."""
    dead = ~_has_finite(x, v)[:, None]
    return torch.where(dead, x, v.log_softmax(torch.where(dead, 0.0, x)))


def _has_finite(x: Tensor, v: Vocabulary) -> Tensor:
    """Rows that are not -inf throughout (NaN and +inf count: they must propagate)."""
    return v.any(x != -math.inf)


def _valid(tau: Tensor) -> Tensor:
    return (tau > 0.0) & (tau < math.inf)


def _entropy(s: Tensor, tau: Tensor, v: Vocabulary) -> Tensor:
    lq = _log_softmax(s / tau[:, None], v)
    return -v.sum(lq.exp() * lq.masked_fill(lq == -math.inf, 0.0))
