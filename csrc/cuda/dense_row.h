// One row of student logits against one of teacher logits, as the threads of a thread-block cluster share it.
//
// A row is read from memory once. The threads first sum over it; then each looks again at its packs, which lie in
// shared memory, and writes their gradient. The functions here are one thread's part of each step, for host and device:
// tests run them without a GPU.
#pragma once

#include "scalar.h"  // the target, before rowmath.h

#include "../divergence.h"
#include "../rowmath.h"
#include "gradient.h"

namespace kdfast::cuda {

KD_INLINE rowmath::Column<float> column_of(float x, float y, const SoftmaxStats& n) {
  const float u = ::fmaf(x, n.c.s, -n.origin_s), v = ::fmaf(y, n.c.t, -n.origin_t);
  return {exp2(v) * n.factor_t, exp2(u) * n.factor_s, (v - u) * kLn2 + (n.log_s - n.log_t), v * kLn2 - n.log_t,
          u * kLn2 - n.log_s};
}

template <Kind kKind>
KD_INLINE rowmath::Element<float> element_of(const rowmath::Column<float>& column, const Divergence& divergence) {
  const rowmath::Parameters<float> parameters = {divergence.a, divergence.b, -::logf(float(divergence.a)),
                                                 -::log1pf(-float(divergence.a))};
  return rowmath::element<kKind>(column, parameters, {kLowest, kInf});
}

using Values = rowmath::Element<float>;  // sums of them

template <Kind kKind, typename T>
KD_INLINE Values values_of(const Slice<T>& slice, int thread, int threads, const SoftmaxStats& n,
                           const Divergence& divergence) {
  Values sum = {0, 0};
  for (int pack = thread; pack < slice.packs; pack += threads) {
    const bool whole = slice.is_whole(pack);
#pragma unroll
    for (int i = 0; i < Pack<T>::kLanes; ++i) {
      if (!whole && !slice.has(slice.column(pack) + i)) continue;
      const float x = to_float(slice.student[pack].lane[i]), y = to_float(slice.teacher[pack].lane[i]);
      const Values element = element_of<kKind>(column_of(x, y, n), divergence);
      sum.value += element.value;
      sum.h += element.h;
    }
  }
  return sum;
}

template <Kind kKind>
KD_INLINE float forward_value(const Sums& sums) {
  const float keep = kKind == Kind::kSoftCe ? 0.0f : ::logf(sums.t);
  return sums.cross == kInf ? kInf : kLn2 * (sums.cross / sums.t) + (::logf(sums.s) - keep);
}

// Loss and gradient from the row's sums. `values` is used for the family Element alone.
template <Kind kKind>
KD_INLINE RowOutcome outcome_of(const RowCoefficients& row, const Divergence& divergence, int columns, const Sums& sums,
                                const SoftmaxStats& n, const Values& values, const Smoothing& smoothing,
                                float label_logit) {
  RowOutcome out;
  Gradient& g = out.gradient;
  if (row.kd != 0 && n.factor_s != 0 && n.factor_t != 0) {
    constexpr bool forward = is_forward(kKind);
    const float slope = row.kd * float(divergence.scale) / row.tau_s;
    out.loss = row.kd * float(divergence.scale) * (forward ? forward_value<kKind>(sums) : values.value);
    g.a = (forward ? slope : -slope * values.h) * n.factor_s;
    g.b = forward ? -slope * n.factor_t : slope;
  }
  if (row.wants_lse() && n.factor_s != 0) {
    const bool shared = unit_tau_of(row) == UnitTau::kShared;
    const float lse = sums.max_s + ::logf(shared ? sums.s : sums.unit);
    (shared ? g.a : g.c) += add_truth(row, lse, smoothing, label_logit, out) * n.factor_unit;
  }
  // A NaN may hide in columns that the divergence selects away (masked, or of a probability of 0): the sums show it.
  const bool lost = sums.s != sums.s || sums.t != sums.t;
  if (lost || is_bad(row, columns)) out.loss = __builtin_nanf("");
  g.failed = out.loss != out.loss;
  return out;
}

template <Kind kKind, UnitTau kUnitTau>
KD_INLINE float gradient_of(float x, float y, const Gradient& g, const SoftmaxStats& n, const Divergence& divergence) {
  const float value = student_gradient<kUnitTau>(x, g, n);
  if constexpr (is_forward(kKind))
    return ::fmaf(g.b, exp2(::fmaf(y, n.c.t, -n.origin_t)), value);
  else
    return g.b != 0 ? ::fmaf(g.b, element_of<kKind>(column_of(x, y, n), divergence).h, value) : value;
}

template <Kind kKind, UnitTau kUnitTau, typename T>
KD_INLINE void write_with_teacher(const Slice<T>& slice, int thread, int threads, const Gradient& g,
                                  const SoftmaxStats& n, const Divergence& divergence, int label,
                                  const GradientRow<T>& to) {
  write_columns<true>(slice, thread, threads, label, g.label, to,
                      [&](float x, float y) { return gradient_of<kKind, kUnitTau>(x, y, g, n, divergence); });
}

template <Kind kKind, typename T>
KD_INLINE void write_gradient(const Slice<T>& slice, int thread, int threads, const Gradient& g, const SoftmaxStats& n,
                              const Divergence& divergence, bool teacher, int label, UnitTau mode,
                              const GradientRow<T>& to) {
  if (!teacher)
    write_columns<false>(slice, thread, threads, label, g.label, to,
                         [&](float x, float) { return student_gradient<UnitTau::kShared>(x, g, n); });
  else if (mode == UnitTau::kSquared)
    write_with_teacher<kKind, UnitTau::kSquared>(slice, thread, threads, g, n, divergence, label, to);
  else if (mode == UnitTau::kSeparate)
    write_with_teacher<kKind, UnitTau::kSeparate>(slice, thread, threads, g, n, divergence, label, to);
  else
    write_with_teacher<kKind, UnitTau::kShared>(slice, thread, threads, g, n, divergence, label, to);
}

}  // namespace kdfast::cuda
