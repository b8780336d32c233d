"""The divergences of the Triton kernels: each one's formula for a column, and how a kernel computes it from a row.

A divergence that is a sum over columns (the "element" family) is two numbers per column, as in ``csrc/rowmath.h``: its
value and h. With u the student's tempered logits, dD/du_j = h_j - q_j sum_k h_k where h_j = q_j dD/dq_j. A side's logit
of -inf makes its probability 0 and the log-ratio infinite or NaN, so every product with the log-ratio is selected,
never multiplied, to 0.

To add such a divergence, write its formula here and its branch in ``element``. No other file of the Triton kernels
names a divergence of this family.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["INF", "LN2", "LOG2E", "ONE_READ", "WITHOUT_PROTOTYPES", "Parameters", "case_of", "element", "family_of"]
__all__ += ["log1p", "log2_or_lowest", "log_odds", "log_sigmoid", "parameters_of", "sum_of_values", "two_classes"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(1.1754943508222875e-38)

# ---- how a kernel computes a divergence ------------------------------------------------------------------------------

# Divergences whose value and gradient follow from sums over the row, which the first sweep makes: over the teacher's
# probabilities ("forward"), over the student's as well ("reverse"), or of squared logit gaps ("mse"). Every other one
# is an "element": it needs the probabilities first, and then a value and an h per column.
_FAMILIES = {
    "forward_kl": "forward",
    "soft_ce": "forward",
    "dkd": "forward",
    "reverse_kl": "reverse",
    "symmetric_kl": "reverse",
    "logit_mse": "mse",
}
# Divergences from a mixture of p and q, by the weight of p in it.
_MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")
# What the one-read form of the dense kernel takes: others would spill registers.
ONE_READ = ("forward_kl", "soft_ce")
# What a cached row can be compared by when only the mass of its tail is known, not the tail's distribution.
WITHOUT_PROTOTYPES = ("forward_kl", "soft_ce")


class Parameters(NamedTuple):
    """A divergence's parameters as a kernel reads them; ``a`` and ``b`` are named as in ``kdfast.divergences``."""

    a: tl.tensor
    b: tl.tensor
    one_minus_a: tl.tensor  # from the host's float64
    minus_log_a: tl.tensor  # the logarithms are a mixture's, and 0 for others
    minus_log_one_minus_a: tl.tensor
    scale: tl.tensor  # a factor of value and gradient


def family_of(name: str) -> str:
    """How a kernel computes the divergence: "forward", "reverse", "mse" or "element"."""
    return _FAMILIES.get(name, "element")


def case_of(name: str, a: float, b: float) -> str:
    """Which special case of its formula a kernel is compiled for; "" for the general one."""
    if name == "alpha_beta":
        zeros = {"a=b=0": a == b == 0.0, "b=0": b == 0.0, "a=0": a == 0.0, "a+b=0": a + b == 0.0}
        return next((case for case, holds in zeros.items() if holds), "")
    if name in _MIXTURES:
        weight_of_p = 1.0 - a if name == "skew_reverse_kl" else a
        return "near_q" if weight_of_p <= 0.5 else ""
    return ""


def parameters_of(name: str, a: float, b: float, scale: float) -> Parameters:
    """The parameters of a launch."""
    mixes = name in _MIXTURES
    return Parameters(a, b, 1.0 - a, -math.log(a) if mixes else 0.0, -math.log1p(-a) if mixes else 0.0, scale)


# ---- functions that the formulas need --------------------------------------------------------------------------------


@triton.jit
def log1p(x):
    """Right to a few roundings for small x, too: the rounding of 1 + x is divided out again (Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def log2_or_lowest(x):
    """log2 of x >= 0: -inf at 0, and right below the normal range, where a GPU's logarithm sees 0."""
    small = x < TINY
    y = tl.log2(tl.where(x > 0.0, tl.where(small, x * 18446744073709551616.0, x), 1.0))
    return tl.where(x == 0.0, -INF, tl.where(x > 0.0, tl.where(small, y - 64.0, y), float("nan")))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


# ---- mixtures --------------------------------------------------------------------------------------------------------


@triton.jit
def _log_near(x, y, w):
    """log(x / m) of a mixture m = (1 - w) x + w y with w <= 1/2; harmless where x is negligible."""
    return -log1p(w * tl.minimum(1e30, (y - x) / x))


@triton.jit
def _log_far(x, y, w, one_minus_w, log_x, gap, minus_log_w):
    """log(y / m) of the same mixture, from log(x / m) and the gap log(y / x).

    Where x is negligible, m = w y, and their sum would only bring out the gap's rounding.
    """
    return tl.where(one_minus_w * x > 1e-8 * w * y, gap + log_x, minus_log_w)


@triton.jit
def _mixture_logs(p, q, d, beta, one_minus_beta, minus_log_beta, minus_log_one_minus_beta, NEAR_Q: tl.constexpr):
    """log(p / m) and log(q / m) of m = beta p + (1 - beta) q.

    One logarithm is taken on the side closer to m (q up to beta = 1/2), the other derived from the gap d = log(p / q):
    dividing by beta or 1 - beta would amplify the other side's rounding.
    """
    if NEAR_Q:
        log_q = _log_near(q, p, beta)
        log_p = _log_far(q, p, beta, one_minus_beta, log_q, d, minus_log_beta)
    else:
        log_p = _log_near(p, q, one_minus_beta)
        log_q = _log_far(p, q, one_minus_beta, beta, log_p, -d, minus_log_one_minus_beta)
    return log_p, log_q


@triton.jit
def _jsd(p, q, d, by, NEAR_Q: tl.constexpr):
    """The teacher's half of the value, and h, which is the student's half: sum_of_values() adds them."""
    log_p, log_q = _mixture_logs(p, q, d, by.a, by.one_minus_a, by.minus_log_a, by.minus_log_one_minus_a, NEAR_Q)
    return tl.where(p > 0.0, by.a * p * log_p, 0.0), tl.where(q > 0.0, by.one_minus_a * q * log_q, 0.0)


# The skew divergences' h is only defined up to a multiple of q; this multiple makes it 0 where p = q.


@triton.jit
def _skew_forward_kl(p, q, d, by, NEAR_Q: tl.constexpr):
    log_p, _ = _mixture_logs(p, q, d, by.a, by.one_minus_a, by.minus_log_a, by.minus_log_one_minus_a, NEAR_Q)
    mixture = by.a * p + by.one_minus_a * q
    h = tl.where(mixture > 0.0, by.one_minus_a * by.one_minus_a * q * ((q - p) / mixture), 0.0)
    return tl.where(p > 0.0, p * log_p, 0.0), h


@triton.jit
def _skew_reverse_kl(p, q, d, by, NEAR_Q: tl.constexpr):
    _, log_q = _mixture_logs(p, q, d, by.one_minus_a, by.a, by.minus_log_one_minus_a, by.minus_log_a, NEAR_Q)
    mixture = by.a * q + by.one_minus_a * p
    value = tl.where(q > 0.0, q * log_q, 0.0)
    return value, tl.where(mixture > 0.0, value + by.a * by.one_minus_a * q * ((p - q) / mixture), 0.0)


# ---- others ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tvd(p, q):
    # Compared, not subtracted: a subtraction fused with the product before it tells equal sides apart.
    return tl.abs(0.5 * (q - p)), q * tl.where(q > p, 0.5, tl.where(p > q, -0.5, 0.0))


@triton.jit
def _alpha_beta(d, log_p, log_q, by, CASE: tl.constexpr):
    """The summand with its limits at a = 0, b = 0 and a + b = 0, and where only one side has the column."""
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
    only_p = tl.where((total > 0.0) & (b > 0.0), p_s / (b * total), INF)
    # The limits of the student's lone columns at a = 0 are infinite; there is nothing to divide by.
    finite_q = (total > 0.0) & (a > 0.0)
    only_q = tl.where(finite_q, q_s / (a * total), INF)
    slope_q = tl.where(finite_q, q_s / a, 0.0)
    value = tl.where(has_p, tl.where(has_q, value, only_p), tl.where(has_q, only_q, 0.0))
    return value, tl.where(has_q, tl.where(has_p, h, slope_q), 0.0)


# ---- the column of any of them ---------------------------------------------------------------------------------------


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
    """(value, h) of one column: p is the teacher's probability, q the student's, d = log p - log q."""
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
    """The divergence over columns, from the sums of element()'s two numbers.

    jsd's value is the sum of both: adding them column by column, with both summed, crashes LLVM's vectoriser (Triton
    3.9, unaligned rows, sm_90 and above).
    """
    return values + slopes if KIND == "jsd" else values


# ---- dkd's term of two classes, the target and the rest --------------------------------------------------------------


@triton.jit
def log_odds(exponent, sum_exp):
    """Log-odds of the target against the rest, from its exponent of 2 relative to the rest's origin and the rest's sum
    of exponentials; +inf where the rest is nothing.
    """
    return tl.where(sum_exp == 0.0, INF, exponent * LN2 - tl.log(tl.where(sum_exp == 0.0, 1.0, sum_exp)))


@triton.jit
def _binary_kl(odds_p, odds_q):
    log_p = log_sigmoid(odds_p)
    return tl.where(log_p == -INF, 0.0, tl.exp(log_p) * (log_p - log_sigmoid(odds_q)))


@triton.jit
def two_classes(odds_s, odds_t):
    """(KL between the two classes' probabilities, gap of the target's), from the target's log-odds on both sides.

    The gap is taken on the side where neither is close to 1.
    """
    sign = tl.where(odds_s > 0.0, -1.0, 1.0)
    gap = sign * (1.0 / (1.0 + tl.exp(-sign * odds_s)) - 1.0 / (1.0 + tl.exp(-sign * odds_t)))
    return _binary_kl(odds_t, odds_s) + _binary_kl(-odds_t, -odds_s), gap
