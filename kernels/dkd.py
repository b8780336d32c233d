"""``dkd``'s term of two classes, the target and the rest, from its log-odds on both sides."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.rowmath import INF, LN2, log_sigmoid

__all__ = ["log_odds", "two_classes"]


@triton.jit
def log_odds(exponent, z):
    """Of the target, whose exponent (bits) has the rest's origin, against the rest; +inf where nothing else is."""
    return tl.where(z == 0.0, INF, exponent * LN2 - tl.log(tl.where(z == 0.0, 1.0, z)))


@triton.jit
def _binary_kl(odds_p, odds_q):
    log_p = log_sigmoid(odds_p)
    return tl.where(log_p == -INF, 0.0, tl.exp(log_p) * (log_p - log_sigmoid(odds_q)))


@triton.jit
def two_classes(odds_s, odds_t):
    """(divergence, gap of the target's probabilities), the gap on the side where neither is close to 1."""
    sign = tl.where(odds_s > 0.0, -1.0, 1.0)
    gap = sign * (1.0 / (1.0 + tl.exp(-sign * odds_s)) - 1.0 / (1.0 + tl.exp(-sign * odds_t)))
    return _binary_kl(odds_t, odds_s) + _binary_kl(-odds_t, -odds_s), gap
