"""What one column adds to a divergence and to its gradient, as ``csrc/rowmath.h`` has it, and the functions that needs.

With u the student's tempered logits, dD/du_j = h_j - q_j sum_k h_k where h_j = q_j dD/dq_j. So a divergence is two
numbers per column, its value and h. A side's logit of -inf makes its probability 0 and the gap infinite or NaN, so
every product with the gap is selected, never multiplied, to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["INF", "LN2", "LOG2E", "Parameters", "element", "log1p", "log2_or_lowest", "log_odds", "log_sigmoid"]
__all__ += ["sum_of_values", "two_classes"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(1.1754943508222875e-38)


class Parameters(NamedTuple):
    """A divergence's parameters as a kernel reads them; ``a`` and ``b`` are named as in ``kdfast.divergences``."""

    a: tl.tensor
    b: tl.tensor
    rest: tl.tensor  # 1 - a, from the host's float64
    minus_log_a: tl.tensor
    minus_log_rest: tl.tensor


@triton.jit
def log1p(x):
    """Right to a few roundings for small x, too: the rounding of 1 + x is divided out again (Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def log2_or_lowest(x):
    """Of what is not negative: -inf at 0, right below the normal range, where a GPU's logarithm sees 0."""
    small = x < TINY
    y = tl.log2(tl.where(x > 0.0, tl.where(small, x * 18446744073709551616.0, x), 1.0))
    return tl.where(x == 0.0, -INF, tl.where(x > 0.0, tl.where(small, y - 64.0, y), float("nan")))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log_near(x, y, w):
    """log(x / m) where m is nearer to x, weighing y with w <= 1/2; harmless where x is negligible."""
    return -log1p(w * tl.minimum(1e30, (y - x) / x))


@triton.jit
def _log_far(x, y, w, rest, log_x, gap, minus_log_w):
    """log(y / m) from log(x / m) and the gap log(y / x).

    Where x is negligible, m = w y, and their sum would only bring out the gap's rounding.
    """
    return tl.where(rest * x > 1e-8 * w * y, gap + log_x, minus_log_w)


@triton.jit
def _mixture_logs(p, q, d, beta, rest, minus_log_beta, minus_log_rest, NEAR_Q: tl.constexpr):
    """log(p / m) and log(q / m) of m = beta p + (1 - beta) q: one logarithm serves both.

    It is taken on the side that m is near to (q up to beta = 1/2): what divides by beta or 1 - beta would bring out the
    other side's rounding.
    """
    if NEAR_Q:
        log_q = _log_near(q, p, beta)
        log_p = _log_far(q, p, beta, rest, log_q, d, minus_log_beta)
    else:
        log_p = _log_near(p, q, rest)
        log_q = _log_far(p, q, rest, beta, log_p, -d, minus_log_rest)
    return log_p, log_q


@triton.jit
def _jsd(p, q, d, by, NEAR_Q: tl.constexpr):
    """The teacher's half of the value, and h, which is the student's: sum_of_values() adds them."""
    log_p, log_q = _mixture_logs(p, q, d, by.a, by.rest, by.minus_log_a, by.minus_log_rest, NEAR_Q)
    return tl.where(p > 0.0, by.a * p * log_p, 0.0), tl.where(q > 0.0, by.rest * q * log_q, 0.0)


# The skew divergences' h is only defined up to a multiple of q; this multiple makes it 0 where p = q.


@triton.jit
def _skew_forward_kl(p, q, d, by, NEAR_Q: tl.constexpr):
    log_p, _ = _mixture_logs(p, q, d, by.a, by.rest, by.minus_log_a, by.minus_log_rest, NEAR_Q)
    mixture = by.a * p + by.rest * q
    h = tl.where(mixture > 0.0, by.rest * by.rest * q * ((q - p) / mixture), 0.0)
    return tl.where(p > 0.0, p * log_p, 0.0), h


@triton.jit
def _skew_reverse_kl(p, q, d, by, NEAR_Q: tl.constexpr):
    _, log_q = _mixture_logs(p, q, d, by.rest, by.a, by.minus_log_rest, by.minus_log_a, NEAR_Q)
    mixture = by.a * q + by.rest * p
    value = tl.where(q > 0.0, q * log_q, 0.0)
    return value, tl.where(mixture > 0.0, value + by.a * by.rest * q * ((p - q) / mixture), 0.0)


@triton.jit
def _tvd(p, q):
    # Compared, not subtracted: a subtraction fused with the product before it tells equal sides apart.
    return tl.abs(0.5 * (q - p)), q * tl.where(q > p, 0.5, tl.where(p > q, -0.5, 0.0))


@triton.jit
def _alpha_beta(d, log_p, log_q, by, CASE: tl.constexpr):
    """The summand with its limits at a = 0, b = 0 and a + b = 0, and its lone columns (``csrc/rowmath.h``)."""
    a, b, total = by.a, by.b, by.a + by.b
    # Not the column's d: the value is flat in d around 0 only together with the logarithms it is the difference of.
    gap = log_p - log_q
    q_s, cross = tl.exp(total * log_q), tl.exp(a * log_p + b * log_q)
    p_s = tl.exp(total * log_p)
    h = -q_s * d if CASE == "a=0" or CASE == "a=b=0" else (q_s - cross) / a
    if CASE == "a=b=0":
        value = 0.5 * gap * gap
    elif CASE == "b=0":
        value = (p_s * (a * gap - 1.0) + q_s) / (a * a)
    elif CASE == "a=0":
        value = (p_s - q_s * (b * gap + 1.0)) / (b * b)
    elif CASE == "a+b=0":
        value = (cross - 1.0 - a * gap) / (a * a)
    else:
        value = (a / total * p_s + b / total * q_s - cross) / (a * b)
    has_p, has_q = log_p > -INF, log_q > -INF
    alone_p = tl.where((total > 0.0) & (b > 0.0), p_s / (b * total), INF)
    # Their limits at a = 0 are infinite; there is nothing to divide by.
    finite_q = (total > 0.0) & (a > 0.0)
    alone_q = tl.where(finite_q, q_s / (a * total), INF)
    slope_q = tl.where(finite_q, q_s / a, 0.0)
    value = tl.where(has_p, tl.where(has_q, value, alone_p), tl.where(has_q, alone_q, 0.0))
    return value, tl.where(has_q, tl.where(has_p, h, slope_q), 0.0)


@triton.jit
def _exp_minus_1(x):
    """e^x - 1 without cancellation: the rounding of e^x is divided out again by its own logarithm (Kahan)."""
    y = tl.exp(x)
    z = y - 1.0
    return tl.where(tl.abs(x) > 1.0, z, tl.where(z == 0.0, x, z * (x / log1p(z))))


@triton.jit
def _squared_hellinger(p, q, d):
    """(sqrt p - sqrt q)^2 / 2, as the larger probability times a function of the gap."""
    larger = tl.where(d > 0.0, p, q)
    e = _exp_minus_1(-0.5 * tl.abs(d))  # sqrt(smaller / larger) - 1
    h = 0.5 * e * tl.where(d > 0.0, p * (1.0 + e), -q)
    return tl.where(larger > 0.0, 0.5 * larger * e * e, 0.0), tl.where(larger > 0.0, h, 0.0)


@triton.jit
def _chi_squared(a, b, log_a, gap):
    """(a - b)^2 / b, a (a - b) / b and a - b, from log a and the gap log(a / b).

    A large a / b is a quotient: its gap's rounding would grow with its exponential. Where either underflows, a^2 / b is
    the exponential of its own logarithm.
    """
    square = tl.exp(log_a + gap)
    far, plain = gap > 1.0, (a > TINY) & (b > TINY)
    m = tl.where(far, a / b - 1.0, _exp_minus_1(gap))
    difference = tl.where(far, a - b, b * m)
    value = tl.where(plain, difference * m, square - 2.0 * a + b)
    return value, tl.where(plain, a * m, square - a), difference


@triton.jit
def _pearson_chi2(p, q, d, log_p, log_q):
    """(p - q)^2 / q, infinite where only the student is masked."""
    value, slope, difference = _chi_squared(p, q, log_p, d)
    alone = tl.where(log_p > -INF, INF, 0.0)
    return tl.where(log_q > -INF, value, alone), tl.where(log_q > -INF, -(slope + difference), 0.0)


@triton.jit
def _neyman_chi2(p, q, d, log_p, log_q):
    """(p - q)^2 / p, infinite where only the teacher is masked."""
    value, slope, _ = _chi_squared(q, p, log_q, -d)
    alone = tl.where(log_q > -INF, INF, 0.0)
    return tl.where(log_p > -INF, value, alone), tl.where(log_p > -INF, 2.0 * slope, 0.0)


@triton.jit
def element(p, q, d, log_p, log_q, by, KIND: tl.constexpr, CASE: tl.constexpr):
    """(value, h) of one column: p is the teacher, q the student, d = log p - log q."""
    if KIND == "jsd":
        value, h = _jsd(p, q, d, by, CASE == "near_q")
    elif KIND == "skew_forward_kl":
        value, h = _skew_forward_kl(p, q, d, by, CASE == "near_q")
    elif KIND == "skew_reverse_kl":
        value, h = _skew_reverse_kl(p, q, d, by, CASE == "near_q")
    elif KIND == "tvd":
        value, h = _tvd(p, q)
    elif KIND == "squared_hellinger":
        value, h = _squared_hellinger(p, q, d)
    elif KIND == "pearson_chi2":
        value, h = _pearson_chi2(p, q, d, log_p, log_q)
    elif KIND == "neyman_chi2":
        value, h = _neyman_chi2(p, q, d, log_p, log_q)
    else:
        value, h = _alpha_beta(d, log_p, log_q, by, CASE)
    return value, h


@triton.jit
def sum_of_values(values, slopes, KIND: tl.constexpr):
    """The divergence over columns, from element()'s two sums.

    jsd's value holds its h. Added column by column, with both summed, they crash LLVM's vectoriser (Triton 3.9,
    unaligned rows, sm_90 and above).
    """
    return values + slopes if KIND == "jsd" else values


# dkd's term of two classes, the target and the rest, from its log-odds on both sides.


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
