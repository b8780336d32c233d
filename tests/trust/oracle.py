"""kd_loss written out, row by row, from the papers' formulas: what the differential fuzzer holds it against.

It shares no code with kdfast, its reference included: a mistake in how that one reads a formula must not hide here.
A row is cut to its live columns first, so that no formula meets a mask. It is slow, runs in any dtype, and autograd
gives its gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Two distributions over the same columns; a side's masked column has probability 0 and log-probability -inf."""

    log_p: Tensor
    log_q: Tensor

    @property
    def both(self) -> Tensor:
        return (self.log_p > -math.inf) & (self.log_q > -math.inf)

    @property
    def p_alone(self) -> Tensor:
        return self.log_p[(self.log_p > -math.inf) & (self.log_q == -math.inf)].exp()

    @property
    def q_alone(self) -> Tensor:
        return self.log_q[(self.log_q > -math.inf) & (self.log_p == -math.inf)].exp()


def log_softmax(z: Tensor) -> Tensor:
    """log softmax over the columns that are not -inf; -inf elsewhere."""
    live = (z > -math.inf).nonzero()[:, 0]
    x = z[live]
    return torch.full_like(z, -math.inf).index_copy(0, live, x - torch.logsumexp(x, 0))


def zscore(z: Tensor) -> Tensor:
    """z-scores over the live columns, with the population's standard deviation; a constant row becomes zeros."""
    live = (z > -math.inf).nonzero()[:, 0]
    x = z[live]
    if bool((x == x[0]).all()):
        scores = 0.0 * x
    else:
        centred = x - x.mean()
        scores = centred / centred.square().mean().sqrt()
    return torch.full_like(z, -math.inf).index_copy(0, live, scores)


def kl(pair: Pair) -> Tensor:
    """Sum of p log(p / q)."""
    if len(pair.p_alone):
        return pair.log_q.new_tensor(math.inf)
    lp, lq = pair.log_p[pair.both], pair.log_q[pair.both]
    return (lp.exp() * (lp - lq)).sum()


def mixture(pair: Pair, share: float) -> Tensor:
    """log(share p + (1 - share) q) where either lives."""
    a = pair.log_p + math.log(share)
    b = pair.log_q + math.log1p(-share)
    out = torch.full_like(a, -math.inf)
    for where, value in (
        (pair.both, torch.logaddexp(a[pair.both], b[pair.both])),
        ((a > -math.inf) & (b == -math.inf), a[(a > -math.inf) & (b == -math.inf)]),
        ((b > -math.inf) & (a == -math.inf), b[(b > -math.inf) & (a == -math.inf)]),
    ):
        out = out.index_copy(0, where.nonzero()[:, 0], value)
    return out


def divergence(name: str, a: float, b: float, normalize: bool, pair: Pair) -> Tensor:
    """D(p, q) of every divergence but dkd and logit_mse, which are no functions of p and q alone."""
    swapped = Pair(pair.log_q, pair.log_p)
    lp, lq = pair.log_p[pair.both], pair.log_q[pair.both]
    p, q = lp.exp(), lq.exp()
    alone_p, alone_q = pair.p_alone, pair.q_alone
    infinite = pair.log_q.new_tensor(math.inf)
    if name == "forward_kl":
        return kl(pair)
    if name == "reverse_kl":
        return kl(swapped)
    if name == "symmetric_kl":
        return (kl(pair) + kl(swapped)) / 2
    if name == "soft_ce":
        return infinite if len(alone_p) else -(p * lq).sum()
    if name == "tvd":
        return ((p - q).abs().sum() + alone_p.sum() + alone_q.sum()) / 2
    if name == "squared_hellinger":
        return (((lp / 2).exp() - (lq / 2).exp()).square().sum() + alone_p.sum() + alone_q.sum()) / 2
    if name == "pearson_chi2":  # sum of (p - q)^2 / q
        return infinite if len(alone_p) else ((lp - lq / 2).exp() - (lq / 2).exp()).square().sum() + alone_q.sum()
    if name == "neyman_chi2":
        return infinite if len(alone_q) else ((lq - lp / 2).exp() - (lp / 2).exp()).square().sum() + alone_p.sum()
    if name in ("skew_forward_kl", "skew_reverse_kl"):
        first = pair if name == "skew_forward_kl" else swapped
        return kl(first) if a == 0.0 else kl(Pair(first.log_p, mixture(first, a)))
    if name == "jsd":
        if normalize and a in (0.0, 1.0):
            return kl(swapped) if a else kl(pair)
        m = mixture(pair, a)
        value = a * kl(Pair(pair.log_p, m)) + (1 - a) * kl(Pair(pair.log_q, m))
        return value / (a * (1 - a)) if normalize else value
    assert name == "alpha_beta", name
    return alpha_beta(a, b, pair)


def alpha_beta(a: float, b: float, pair: Pair) -> Tensor:
    """-sum(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b), for a, b > 0."""
    lp, lq = pair.log_p[pair.both], pair.log_q[pair.both]
    c = a + b
    inside = (a * lp + b * lq).exp() - a / c * (c * lp).exp() - b / c * (c * lq).exp()
    outside = a / c * pair.p_alone.pow(c).sum() + b / c * pair.q_alone.pow(c).sum()
    return (outside - inside.sum()) / (a * b)


def dkd(alpha: float, beta: float, s: Tensor, t: Tensor, label: int) -> Tensor:
    """alpha KL(target against the rest) + beta KL(within the rest), of two rows at their temperatures."""
    rest = torch.arange(len(s)) != label
    pair = Pair(log_softmax(t), log_softmax(s))
    binary = []
    for x in (pair.log_p, pair.log_q):
        live = x[rest][x[rest] > -math.inf]
        remainder = torch.logsumexp(live, 0) if len(live) else x.new_tensor(-math.inf)
        binary.append(torch.stack([x[label], remainder]))
    total = alpha * kl(Pair(*binary)) if alpha else 0.0 * s[s > -math.inf].sum()
    if beta and all(bool((x[rest] > -math.inf).any()) for x in (s, t)):
        total = total + beta * kl(Pair(log_softmax(t[rest]), log_softmax(s[rest])))
    return total


def dense_row(div: object, s: Tensor, t: Tensor, tau_s: Tensor, tau_t: Tensor, label: int | None) -> Tensor:
    """D of one row of student and teacher logits over the shared columns; 0 where a side has no live column."""
    if not bool((s > -math.inf).any() and (t > -math.inf).any()):
        return torch.zeros((), dtype=s.dtype)
    if div.standardize:
        s, t = zscore(s), zscore(t)
    if div.name == "logit_mse":
        both = (s > -math.inf) & (t > -math.inf)
        return (s[both] - t[both]).square().sum() / max(int(both.sum()), 1)
    s, t = s / tau_s, t / tau_t
    if div.name == "dkd":
        return dkd(div.a, div.b, s, t, label)
    return divergence(div.name, div.a, div.b, div.normalize, Pair(log_softmax(t), log_softmax(s)))


def sparse_row(s: Tensor, entries: dict[int, float], tail: float | None, minus_entropy: bool, tau: Tensor) -> Tensor:
    """Soft cross-entropy, or KL, of one student row against a few (column, weight) entries and one class for the rest.

    ``entries`` hold no column twice and no weight of 0; ``tail`` is the rest's probability, None for weights of draws.
    """
    if not bool((s > -math.inf).any()):
        return torch.zeros((), dtype=s.dtype)
    log_q = log_softmax(s / tau)
    total = torch.zeros((), dtype=s.dtype)
    for column, weight in entries.items():
        total = total - weight * log_q[column]
        if minus_entropy:
            total = total + weight * math.log(weight)
    if tail:
        rest = torch.ones(len(s), dtype=torch.bool)
        rest[list(entries)] = False
        rest &= log_q > -math.inf
        if not bool(rest.any()):
            return total.new_tensor(math.inf)
        total = total - tail * torch.logsumexp(log_q[rest], 0)
        if minus_entropy:
            total = total + tail * math.log(tail)
    return total


def cross_entropy(s: Tensor, label: int | None, probs: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy at temperature 1; smoothing spreads its share evenly over the student's live columns."""
    if not bool((s > -math.inf).any()) or (label is None and probs is None):
        return torch.zeros((), dtype=s.dtype)
    log_q = log_softmax(s)
    live = log_q > -math.inf
    if probs is not None:
        wanted = probs > 0
        hard = -(probs[wanted] * log_q[wanted]).sum()
    else:
        hard = -log_q[label]
    smooth = -log_q[live].mean()
    return hard if not smoothing else (1 - smoothing) * hard + smoothing * smooth if smoothing < 1 else smooth


def z_loss(s: Tensor) -> Tensor:
    """The square of the row's log-sum-exp."""
    live = s[s > -math.inf]
    return torch.logsumexp(live, 0).square() if len(live) else torch.zeros((), dtype=s.dtype)


def entropy(s: Tensor, tau: Tensor) -> Tensor:
    """The student's entropy at its temperature."""
    live = s[s > -math.inf]
    if not len(live):
        return torch.zeros((), dtype=s.dtype)
    log_q = log_softmax(live / tau)
    return -(log_q.exp() * log_q).sum()
