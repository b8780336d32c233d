// What one column adds to a divergence, and to its gradient.
//
// With u the student's tempered logits, dD/du_j = h_j - q_j * sum_k h_k where h_j = q_j dD/dq_j. So a divergence is
// two numbers per column: its value and h. p is the teacher, q the student, d = log p - log q; a side's logit of -inf
// makes its probability 0 and d infinite or NaN, so every product with d is selected, never multiplied, to 0.
//
// V is a scalar or SIMD type with arithmetic, comparisons, select, min, abs, exp, log1p found by its namespace.

#if defined(KDFAST_ROWMATH_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_ROWMATH_H_
#undef KDFAST_ROWMATH_H_
#else
#define KDFAST_ROWMATH_H_
#endif

#include "divergence.h"
#include "target.h"
#if KDFAST_VEC_BYTES == 4
#include "cuda/scalar.h"
#else
#include "cpu/simd/vec-inl.h"
#endif

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {
namespace rowmath {

template <typename V>
struct Column {
  V p, q, d, log_p, log_q;
};

template <typename V>
struct Element {
  V value, h;
};

// The lowest finite number and infinity.
template <typename V>
struct Limits {
  V lowest, inf;
};

// probability * gap; 0 where the probability is 0. Infinite where the gap is and the probability underflowed to 0 while
// its logarithm is finite.
template <typename V>
KD_INLINE V weighted(V probability, V log_probability, V gap, const Limits<V>& limits) {
  const V lost = select((log_probability > limits.lowest) & (gap == limits.inf), limits.inf, V(0));
  return select(probability > V(0), probability * gap, lost);
}

template <typename V>
KD_INLINE Element<V> reverse_kl(const Column<V>& c, const Limits<V>& limits) {
  const V h = select((c.log_q > limits.lowest) & (c.log_p > limits.lowest), -c.q * c.d, V(0));
  return {weighted(c.q, c.log_q, -c.d, limits), h};
}

template <typename V>
KD_INLINE Element<V> symmetric_kl(const Column<V>& c, const Limits<V>& limits) {
  const Element<V> reverse = reverse_kl(c, limits);
  const V forward = weighted(c.p, c.log_p, c.d, limits), half(0.5);
  return {half * (forward + reverse.value), half * (reverse.h + (c.q - c.p))};
}

// log(p / m), valid where p > 0, and log(q / m), valid where q > 0, for the mixture m = beta p + (1 - beta) q.
template <typename V>
struct MixtureLogs {
  V p, q;
};

// log(x / m) for m = (1 - w) x + w y with w <= 1/2, which is nearer to x. Finite where x is negligible.
template <typename V>
KD_INLINE V log_near(V x, V y, V w) {
  return -log1p(w * min(V(1e30), (y - x) / x));
}

// log(y / m) from log(x / m) and the gap log(y / x). Where x is negligible, m = w y, and what x adds to it is too: use
// that, as the sum would amplify the gap's rounding. In float it is below the rounding of log w.
template <typename V>
KD_INLINE V log_far(V x, V y, V w, V log_x, V gap, V minus_log_w) {
  const V near = (V(1) - w) * x, far = w * y;
  V log_y = minus_log_w;
  if constexpr (kIsWide<V>) log_y = log_y - select(far > V(0), near / far, V(0));
  return select(near > V(1e-8) * far, gap + log_x, log_y);
}

// Takes one log1p, on the side closer to m, and derives the other logarithm from the gap: dividing by beta or 1 - beta
// would amplify rounding.
template <typename V>
KD_INLINE MixtureLogs<V> mixture_logs(const Column<V>& c, double beta, V minus_log_beta, V minus_log_rest) {
  const V beta_v((beta)), rest((1 - beta));
  if (beta <= 0.5) {
    const V q = log_near(c.q, c.p, beta_v);
    return {log_far(c.q, c.p, beta_v, q, c.d, minus_log_beta), q};
  }
  const V p = log_near(c.p, c.q, rest);
  return {p, log_far(c.p, c.q, rest, p, -c.d, minus_log_rest)};
}

// beta KL(p || m) + (1 - beta) KL(q || m).
template <typename V>
KD_INLINE Element<V> jsd(const Column<V>& c, double beta, V minus_log_beta, V minus_log_rest) {
  const V zero(0);
  const MixtureLogs<V> log = mixture_logs(c, beta, minus_log_beta, minus_log_rest);
  const V p_term = select(c.p > zero, V(beta) * c.p * log.p, zero);
  const V q_term = select(c.q > zero, V(1 - beta) * c.q * log.q, zero);
  return {p_term + q_term, q_term};
}

// h is only defined up to a multiple of q. The skew divergences choose the one that makes it 0 where p = q.

// KL(p || lam p + (1 - lam) q).
template <typename V>
KD_INLINE Element<V> skew_forward_kl(const Column<V>& c, double lam, V minus_log_lam, V minus_log_rest) {
  const V zero(0), rest((1 - lam)), mixture = V(lam) * c.p + rest * c.q;
  const MixtureLogs<V> log = mixture_logs(c, lam, minus_log_lam, minus_log_rest);
  return {select(c.p > zero, c.p * log.p, zero),
          select(mixture > zero, rest * rest * c.q * ((c.q - c.p) / mixture), zero)};
}

// KL(q || lam q + (1 - lam) p).
template <typename V>
KD_INLINE Element<V> skew_reverse_kl(const Column<V>& c, double lam, V minus_log_lam, V minus_log_rest) {
  const V zero(0), rest((1 - lam)), mixture = V(lam) * c.q + rest * c.p;
  const MixtureLogs<V> log = mixture_logs(c, 1 - lam, minus_log_rest, minus_log_lam);
  const V value = select(c.q > zero, c.q * log.q, zero);
  return {value, select(mixture > zero, value + V(lam) * rest * c.q * ((c.p - c.q) / mixture), zero)};
}

template <typename V>
KD_INLINE Element<V> tvd(const Column<V>& c) {
  const V half(0.5), gap = c.q - c.p;
  const V sign = select(gap > V(0), half, select(V(0) > gap, -half, V(0)));
  return {abs(half * gap), c.q * sign};
}

// The alpha-beta summand with its limits at a = 0, b = 0 and a + b = 0 (Cichocki, Cruces & Amari 2011), and its lone
// columns: only p alive gives p^(a+b) / (b (a+b)), only q alive q^(a+b) / (a (a+b)), or +inf where that diverges.
template <typename V>
KD_INLINE Element<V> alpha_beta(const Column<V>& c, double a, double b, const Limits<V>& limits) {
  const double sum = a + b;
  const V va((a)), vb((b)), vs((sum));
  // Not the column's d, whose rounding differs: near d = 0 the terms cancel only for the difference of these
  // logarithms.
  const V d = c.log_p - c.log_q;
  const V p_s = exp(vs * c.log_p), q_s = exp(vs * c.log_q), cross = exp(va * c.log_p + vb * c.log_q);
  Element<V> both, lone_p = {limits.inf, V(0)}, lone_q = {limits.inf, V(0)};
  both.h = a == 0 ? -q_s * c.d : (q_s - cross) * V(1 / a);
  if (a == 0 && b == 0) {
    both.value = V(0.5) * d * d;
  } else if (b == 0) {
    both.value = (p_s * (va * d - V(1)) + q_s) * V(1 / (a * a));
  } else if (a == 0) {
    both.value = (p_s - q_s * (vb * d + V(1))) * V(1 / (b * b));
  } else if (sum == 0) {
    both.value = (cross - V(1) - va * d) * V(1 / (a * a));
  } else {
    both.value = (V(a / sum) * p_s + V(b / sum) * q_s - cross) * V(1 / (a * b));
  }
  if (sum > 0 && b > 0) lone_p.value = p_s * V(1 / (b * sum));
  if (sum > 0 && a > 0) lone_q = {q_s * V(1 / (a * sum)), q_s * V(1 / a)};
  const auto has_p = c.log_p > limits.lowest, has_q = c.log_q > limits.lowest;
  const V value = select(has_p, select(has_q, both.value, lone_p.value), select(has_q, lone_q.value, V(0)));
  return {value, select(has_p, select(has_q, both.h, V(0)), select(has_q, lone_q.h, V(0)))};
}

// e^x - 1 without cancellation: the rounding of e^x is divided out again by its own logarithm (Kahan).
template <typename V>
KD_INLINE V exp_minus_1(V x) {
  const V one(1), y = exp(x), z = y - one;
  return select(abs(x) > one, z, select(z == V(0), x, z * (x / log1p(z))));
}

// (sqrt p - sqrt q)^2 / 2, as the larger probability times a function of the gap.
template <typename V>
KD_INLINE Element<V> squared_hellinger(const Column<V>& c) {
  const V zero(0), half(0.5), one(1), larger = select(c.d > zero, c.p, c.q);
  const V e = exp_minus_1(-half * abs(c.d));  // sqrt(smaller / larger) - 1
  const V h = half * e * select(c.d > zero, c.p * (one + e), -c.q);
  return {select(larger > zero, half * larger * e * e, zero), select(larger > zero, h, zero)};
}

// Of two probabilities: (a - b)^2 / b, a (a - b) / b and a - b, from log a and the gap log(a / b).
template <typename V>
struct ChiSquared {
  V value, slope, difference;
};

// A large a / b is a quotient: its gap's rounding would grow with its exponential. Where either underflows, a^2 / b is
// the exponential of its own logarithm.
template <typename V>
KD_INLINE ChiSquared<V> chi_squared(V a, V b, V log_a, V gap) {
  const V one(1), tiny(1.2e-38), square = exp(log_a + gap);
  const auto far = gap > one;
  const auto plain = (a > tiny) & (b > tiny);
  const V m = select(far, a / b - one, exp_minus_1(gap)), difference = select(far, a - b, b * m);
  return {select(plain, difference * m, square - V(2) * a + b), select(plain, a * m, square - a), difference};
}

// (p - q)^2 / q, infinite where only the student is masked.
template <typename V>
KD_INLINE Element<V> pearson_chi2(const Column<V>& c, const Limits<V>& limits) {
  const V zero(0);
  const ChiSquared<V> chi = chi_squared(c.p, c.q, c.log_p, c.d);
  const auto has_p = c.log_p > limits.lowest, has_q = c.log_q > limits.lowest;
  const V h = -(chi.slope + chi.difference);  // q - p^2 / q
  return {select(has_q, chi.value, select(has_p, limits.inf, zero)), select(has_q, h, zero)};
}

// (p - q)^2 / p, infinite where only the teacher is masked.
template <typename V>
KD_INLINE Element<V> neyman_chi2(const Column<V>& c, const Limits<V>& limits) {
  const V zero(0);
  const ChiSquared<V> chi = chi_squared(c.q, c.p, c.log_q, -c.d);
  const auto has_p = c.log_p > limits.lowest, has_q = c.log_q > limits.lowest;
  return {select(has_p, chi.value, select(has_q, limits.inf, zero)), select(has_p, V(2) * chi.slope, zero)};
}

// A divergence's parameters, and -log a and -log(1 - a) for those whose `a` is a mixture's weight.
template <typename V>
struct Parameters {
  double a, b;
  V minus_log_a, minus_log_rest;
};

// What a column adds to the divergence `kKind`, of the family Element.
template <Kind kKind, typename V>
KD_INLINE Element<V> element(const Column<V>& c, const Parameters<V>& by, const Limits<V>& limits) {
  static_assert(is_element(kKind));
  if constexpr (kKind == Kind::kReverseKl) return reverse_kl(c, limits);
  if constexpr (kKind == Kind::kSymmetricKl) return symmetric_kl(c, limits);
  if constexpr (kKind == Kind::kJsd) return jsd(c, by.a, by.minus_log_a, by.minus_log_rest);
  if constexpr (kKind == Kind::kSkewForwardKl) return skew_forward_kl(c, by.a, by.minus_log_a, by.minus_log_rest);
  if constexpr (kKind == Kind::kSkewReverseKl) return skew_reverse_kl(c, by.a, by.minus_log_a, by.minus_log_rest);
  if constexpr (kKind == Kind::kTvd) return tvd(c);
  if constexpr (kKind == Kind::kAlphaBeta) return alpha_beta(c, by.a, by.b, limits);
  if constexpr (kKind == Kind::kSquaredHellinger) return squared_hellinger(c);
  if constexpr (kKind == Kind::kPearsonChi2) return pearson_chi2(c, limits);
  if constexpr (kKind == Kind::kNeymanChi2) return neyman_chi2(c, limits);
}

}  // namespace rowmath

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
