// What one column adds to a divergence, and to its gradient.
//
// With u the student's tempered logits, dD/du_j = h_j - q_j * sum_k h_k where h_j = q_j dD/dq_j. So a divergence is
// two numbers per column: its value and h. p is the teacher, q the student, d = log p - log q; a side's logit of -inf
// makes its probability 0 and d infinite or NaN, so every product with d is selected, never multiplied, to 0.
//
// V is a scalar or SIMD type with arithmetic, comparisons, select, max, abs, exp, log1p found by its namespace.
#pragma once  // included inside a namespace: the includer brings every header

#ifdef __CUDACC__
#define KD_HD __host__ __device__ __forceinline__
#else
#define KD_HD inline __attribute__((always_inline))
#endif

namespace rowmath {

template <typename V>
struct Column {
  V p, q, d, log_p, log_q;
};

template <typename V>
struct Element {
  V value, h;
};

// The smallest normal number and the lowest finite one.
template <typename V>
struct Limits {
  V tiny, lowest, inf;
};

// probability * gap, 0 where the probability is masked. A probability that merely underflowed still meets an infinite
// gap: 0 * inf would be NaN, tiny * inf is inf.
template <typename V>
KD_HD V weighted(V probability, V log_probability, V gap, const Limits<V>& limits) {
  return select(log_probability > limits.lowest, max(probability, limits.tiny) * gap, V(0));
}

// log(x / m) for the mixture m = w y + (1 - w) x; accurate near w = 0 and near x = y, harmless where x is negligible.
template <typename V>
KD_HD V log_over_mixture(V x, V y, V w) {
  return -log1p(w * min(V(1e30), (y - x) / x));
}

// log(y / m) for the same mixture from log_over_mixture(x, y, w) and gap = log(y / x). Where x is negligible, m = w y
// and the sum of the two would only bring out the rounding of the gap.
template <typename V>
KD_HD V log_other_over_mixture(V x, V y, V w, V log_x_over_m, V gap, V minus_log_w) {
  return select((V(1) - w) * x > V(1e-8) * w * y, gap + log_x_over_m, minus_log_w);
}

template <typename V>
KD_HD Element<V> reverse_kl(const Column<V>& c, const Limits<V>& limits) {
  return {weighted(c.q, c.log_q, -c.d, limits), select(c.log_q > limits.lowest, -c.q * c.d, V(0))};
}

template <typename V>
KD_HD Element<V> symmetric_kl(const Column<V>& c, const Limits<V>& limits) {
  const Element<V> reverse = reverse_kl(c, limits);
  const V forward = weighted(c.p, c.log_p, c.d, limits), half(0.5);
  return {half * (forward + reverse.value), half * (reverse.h - c.p)};
}

// beta KL(p || m) + (1 - beta) KL(q || m). One logarithm serves both, taken on the side that m is near to:
// normalisation divides by beta (1 - beta), and would bring out the other side's rounding.
template <typename V>
KD_HD Element<V> jsd(const Column<V>& c, double beta, V minus_log_beta, V minus_log_rest) {
  const V zero(0), p_weight((beta)), q_weight((1 - beta));
  V p_log_ratio, q_log_ratio;
  if (beta <= 0.5) {
    q_log_ratio = log_over_mixture(c.q, c.p, p_weight);
    p_log_ratio = log_other_over_mixture(c.q, c.p, p_weight, q_log_ratio, c.d, minus_log_beta);
  } else {
    p_log_ratio = log_over_mixture(c.p, c.q, q_weight);
    q_log_ratio = log_other_over_mixture(c.p, c.q, q_weight, p_log_ratio, -c.d, minus_log_rest);
  }
  const V p_term = select(c.p > zero, p_weight * c.p * p_log_ratio, zero);
  const V q_term = select(c.q > zero, q_weight * c.q * q_log_ratio, zero);
  return {p_term + q_term, q_term};
}

// KL(p || lam p + (1 - lam) q).
template <typename V>
KD_HD Element<V> skew_forward_kl(const Column<V>& c, V lam, V minus_log_lam) {
  const V zero(0), rest = V(1) - lam, mixture = lam * c.p + rest * c.q;
  const V q_log_ratio = log_over_mixture(c.q, c.p, lam);
  const V p_log_ratio = log_other_over_mixture(c.q, c.p, lam, q_log_ratio, c.d, minus_log_lam);
  return {select(c.p > zero, c.p * p_log_ratio, zero), select(mixture > zero, -rest * c.p * c.q / mixture, zero)};
}

// KL(q || lam q + (1 - lam) p).
template <typename V>
KD_HD Element<V> skew_reverse_kl(const Column<V>& c, V lam) {
  const V zero(0), rest = V(1) - lam, mixture = lam * c.q + rest * c.p;
  const V value = select(c.q > zero, c.q * log_over_mixture(c.q, c.p, rest), zero);
  return {value, select(mixture > zero, value - lam * c.q * c.q / mixture, zero)};
}

template <typename V>
KD_HD Element<V> tvd(const Column<V>& c) {
  const V half(0.5), gap = c.q - c.p;
  const V sign = select(gap > V(0), half, select(V(0) > gap, -half, V(0)));
  return {abs(half * gap), c.q * sign};
}

// The alpha-beta summand with its limits at a = 0, b = 0 and a + b = 0 (Cichocki, Cruces & Amari 2011), and its lone
// columns: only p alive gives p^(a+b) / (b (a+b)), only q alive q^(a+b) / (a (a+b)), or +inf where that diverges.
template <typename V>
KD_HD Element<V> alpha_beta(const Column<V>& c, double a, double b, const Limits<V>& limits) {
  const double sum = a + b;
  const V va((a)), vb((b)), vs((sum));
  // Not the column's d: the summand is flat in d around 0 only together with the logarithms it is the difference of.
  const V d = c.log_p - c.log_q;
  const V p_s = exp(vs * c.log_p), q_s = exp(vs * c.log_q), cross = exp(va * c.log_p + vb * c.log_q);
  Element<V> both, lone_p = {limits.inf, V(0)}, lone_q = {limits.inf, V(0)};
  both.h = a == 0 ? -q_s * d : (q_s - cross) * V(1 / a);
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

}  // namespace rowmath
