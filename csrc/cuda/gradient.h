// The softmax's statistics, the ground-truth terms, and how a gradient is written. Host and device.
#pragma once

#include "sums.h"

namespace kdfast::cuda {

// Both sides' softmax: a logit's probability is factor * 2^(x c - origin), its logarithm follows from log_s and log_t.
struct SoftmaxStats {
  Scales c;
  float origin_s, origin_t, origin_unit;
  float factor_s, factor_t, factor_unit;  // 0 where all of a side's columns are masked
  float log_s, log_t;                     // logarithms of the sums
};

KD_INLINE SoftmaxStats softmax_stats(const Sums& sums, Scales c, UnitTau mode) {
  SoftmaxStats n = {c, 0, 0, 0, 0, 0, 0, ::logf(sums.s), ::logf(sums.t)};
  if (sums.max_s > -kInf) {
    n.origin_s = origin_of(sums.max_s, c.s);
    n.origin_unit = origin_of(sums.max_s, kLog2e);
    n.factor_s = 1 / sums.s;
    n.factor_unit = mode == UnitTau::kShared ? n.factor_s : 1 / sums.unit;
  }
  if (sums.max_t > -kInf) {
    n.origin_t = origin_of(sums.max_t, c.t);
    n.factor_t = 1 / sums.t;
  }
  return n;
}

// A column's gradient, with exponentials e relative to their origins: a e_s + b e_t (or b h) + c e_s^2 (or c e_unit) -
// share; minus `label` in the label's column; 0 in masked columns.
struct Gradient {
  float a = 0, b = 0, c = 0, share = 0, label = 0;
  bool failed = false;  // NaN throughout
};

struct RowOutcome {
  float loss = 0;
  Gradient gradient;
};

// Cross-entropy of the label's logit, smoothed.
KD_INLINE float cross_entropy(const RowCoefficients& row, float lse, float label_logit, const Smoothing& smoothing) {
  const float hard = row.smoothing < 1 ? lse - label_logit : 0.0f;
  if (row.smoothing == 0) return hard;
  const float smooth = lse - smoothing.logits / smoothing.count;
  return row.smoothing == 1 ? smooth : (1 - row.smoothing) * hard + row.smoothing * smooth;
}

// Adds cross-entropy and z-loss to the outcome. Returns the weight of the softmax at temperature 1 in the gradient.
KD_INLINE float add_truth(const RowCoefficients& row, float lse, const Smoothing& smoothing, float label_logit,
                          RowOutcome& out) {
  float slope = 0;
  if (row.wants_ce()) {
    out.loss += row.ce * cross_entropy(row, lse, label_logit, smoothing);
    slope = row.ce;
    out.gradient.share = row.smoothing != 0 ? row.ce * row.smoothing / smoothing.count : 0.0f;
    out.gradient.label = row.ce * (1 - row.smoothing);
  }
  if (row.z_weight != 0) {
    out.loss += row.z_weight * lse * lse;
    slope += 2 * row.z_weight * lse;
  }
  return slope;
}

// The part of a column's gradient that depends on the student's logit alone: tempered softmax and temperature 1.
template <UnitTau kUnitTau>
KD_INLINE float student_gradient(float x, const Gradient& g, const SoftmaxStats& n) {
  const float e = exp2(::fmaf(x, n.c.s, -n.origin_s));
  const float value = ::fmaf(kUnitTau == UnitTau::kSquared ? ::fmaf(g.c, e, g.a) : g.a, e, -g.share);
  if constexpr (kUnitTau != UnitTau::kSeparate) return value;
  return ::fmaf(g.c, exp2(::fmaf(x, kLog2e, -n.origin_unit)), value);
}

// A row's gradient in memory. Whole packs are stored where it is aligned as the student's row is.
template <typename T>
struct GradientRow {
  T* row;
  bool aligned;
};

template <typename T>
KD_INLINE void store(const GradientRow<T>& to, const Slice<T>& slice, int pack, const Pack<T>& value) {
  const int column = slice.column(pack);
  if (to.aligned && slice.is_whole(pack)) {
    *reinterpret_cast<Pack<T>*>(to.row + column) = value;
    return;
  }
#pragma unroll  // indexing lanes at run time would move the pack to local memory
  for (int i = 0; i < Pack<T>::kLanes; ++i)
    if (slice.has(column + i)) to.row[column + i] = value.lane[i];
}

// Writes of(x, y), a function of both sides' logits, to a thread's packs; minus `less` in the label's column, and 0 in
// masked columns.
template <bool kTeacher, typename T, typename Of>
KD_INLINE void write_columns(const Slice<T>& slice, int thread, int threads, int label, float less,
                             const GradientRow<T>& to, Of of) {
  constexpr int kLanes = Pack<T>::kLanes;
  for (int pack = thread; pack < slice.packs; pack += threads) {
    float x[kLanes], y[kLanes], value[kLanes];
    const Pack<T> student = slice.student[pack];
    unpack(student, x);
    if constexpr (kTeacher) unpack(slice.teacher[pack], y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] = of(x[i], kTeacher ? y[i] : 0.0f);
    const int at = label - slice.column(pack);
    if (at >= 0 && at < kLanes) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) value[i] -= i == at ? less : 0.0f;
    }
    store(to, slice, pack, pack_unmasked(value, student));
  }
}

// Fills the gradient with one number: 0 where all coefficients are 0, NaN where the loss is NaN.
template <typename T>
KD_INLINE void fill_gradient(const Slice<T>& slice, int thread, int threads, float value, const GradientRow<T>& to) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < Pack<T>::kLanes; ++i) out.lane[i] = from_float<T>(value);
  for (int pack = thread; pack < slice.packs; pack += threads) store(to, slice, pack, out);
}

}  // namespace kdfast::cuda
