// One row of student logits against K (id, weight) entries and a tail, as the threads of a cluster share it.
//
// The entries' columns are masked before the exponentials are summed, so that the tail's log-sum-exp is accurate
// however small its mass is; their gradient is written last. Host and device.
#pragma once

#include "gradient.h"

namespace kdfast::cuda {

// A row's entries. The student's logits move from the row, which is masked there, to `logit`. An entry of weight 0 is
// padding: whatever its id, it is as if it were not there.
struct EntriesView {
  const int32_t* id;
  const float* weight;
  float* logit;
  int64_t count;
  float tail;  // log-mass of everything else; -inf: none

  KD_INLINE bool is_padding(int64_t i) const { return weight[i] == 0; }
};

// The entries of all rows, one row's after another's.
struct EntryLists {
  const int32_t* ids;      // (count,)
  const float* weights;    // (count,)
  const int64_t* offsets;  // (rows + 1,)
  const float* tail;       // (rows,); nullptr: none
  float* logits;           // (count,), a buffer for the student's logits at the entries
  int64_t count;

  // A row's. Offsets that leave the lists, or go back, make its loss NaN: nothing outside the lists is read.
  KD_INLINE EntriesView row(int64_t i) const {
    const int64_t begin = offsets[i], end = offsets[i + 1];
    if (begin < 0 || begin > end || end > count) return {ids, weights, logits, 0, __builtin_nanf("")};
    return {ids + begin, weights + begin, logits + begin, end - begin, tail ? tail[i] : -kInf};
  }
};

struct SparseSums {
  Sums outside;       // of the columns outside the entries
  Sums entries;       // of the entries, with their weights as the teacher's exponentials
  float entropy = 0;  // sum of w log w
};

template <UnitTau kUnitTau>
KD_INLINE void include_entry(SparseSums& sums, float x, float weight, Scales c) {
  Sums& at = sums.entries;
  at.max_t = 0;  // weights are not relative to a maximum
  if (x > at.max_s) raise_student<kUnitTau>(at, x, c);
  const float u = ::fmaf(x, c.s, -origin_of(at.max_s, c.s));
  if (x != -kInf) {
    const float e = exp2(u);
    at.s += e;
    if (kUnitTau == UnitTau::kSquared) at.unit += e * e;
    if (kUnitTau == UnitTau::kSeparate) at.unit += exp2(::fmaf(x, kLog2e, -origin_of(at.max_s, kLog2e)));
  }
  if (!(weight > 0)) return;
  at.t += weight;
  at.cross = x == -kInf ? kInf : at.cross - weight * u;
  sums.entropy += weight * ::logf(weight);
}

// Masks a thread's entries in the block's columns and sums them. An id that is no column's makes the row NaN.
template <UnitTau kUnitTau, typename T>
KD_INLINE void take_entries(SparseSums& sums, const Slice<T>& slice, Pack<T>* student, const EntriesView& entries,
                            int thread, int threads, Scales c) {
  constexpr int kLanes = Pack<T>::kLanes;
  for (int64_t i = thread; i < entries.count; i += threads) {
    if (entries.is_padding(i)) continue;
    const int id = entries.id[i], at = id - slice.first;
    if (!slice.has(id)) sums.entries.s = __builtin_nanf("");
    if (!slice.has(id) || at < 0 || at >= slice.packs * kLanes) continue;
    T& lane = student[at / kLanes].lane[at % kLanes];
    const float x = to_float(lane);
    entries.logit[i] = x;
    lane = from_float<T>(-kInf);
    include_entry<kUnitTau>(sums, x, entries.weight[i], c);
  }
}

template <UnitTau kUnitTau, typename T>
KD_INLINE void sweep_outside(SparseSums& sums, const Slice<T>& slice, int thread, int threads, Scales c) {
  sums.outside = sweep<Sweep<kUnitTau, false, false>>(slice, thread, threads, c);
}

KD_INLINE SparseSums merge(const SparseSums& a, const SparseSums& b, Scales c, UnitTau mode) {
  return {merge(a.outside, b.outside, c, mode), merge(a.entries, b.entries, c, mode), a.entropy + b.entropy};
}

// The row's loss and softmax, and the coefficients of the gradient at and outside the entries.
struct SparseOutcome {
  RowOutcome row;
  SoftmaxStats outside, all;  // relative to the largest logit outside the entries, and of all
  float slope = 0;            // of the divergence's gradient, per unit of a weight
  float mass = 0;             // slope times the mass of all weights and the tail
  float unit = 0;             // weight of the softmax at temperature 1, for exponentials relative to `all`
};

KD_INLINE float sparse_value(const SparseSums& sums, const Sums& all, const EntriesView& entries, Scales c,
                             bool subtract_entropy) {
  const float log_all = ::logf(all.s);
  float value = all.cross == kInf ? kInf : kLn2 * all.cross + all.t * log_all;
  if (subtract_entropy) value += sums.entropy;
  if (entries.tail == -kInf) return value;
  if (!(sums.outside.max_s > -kInf) && sums.outside.s == 0) return kInf;
  // Computed relative to the outside's own origin: relative to the entries' it might underflow.
  const float lower = origin_of(sums.outside.max_s, c.s) - origin_of(all.max_s, c.s);
  const float log_tail = lower * kLn2 + ::logf(sums.outside.s) - log_all;
  return value + ::expf(entries.tail) * ((subtract_entropy ? entries.tail : 0.0f) - log_tail);
}

KD_INLINE SparseOutcome outcome_of(const RowCoefficients& row, int columns, const SparseSums& sums,
                                   const EntriesView& entries, Scales c, bool subtract_entropy,
                                   const Smoothing& smoothing, float label_logit) {
  const UnitTau mode = unit_tau_of(row);
  Sums all = merge(sums.outside, sums.entries, c, mode);
  SparseOutcome out;
  out.outside = softmax_stats(sums.outside, c, mode);
  out.all = softmax_stats(all, c, mode);
  Gradient& g = out.row.gradient;
  const bool alive = out.all.factor_s != 0;
  if (row.kd != 0 && alive) {
    const float tail = entries.tail == -kInf ? 0.0f : ::expf(entries.tail);
    out.row.loss = row.kd * sparse_value(sums, all, entries, c, subtract_entropy);
    out.slope = row.kd / row.tau_s;
    out.mass = out.slope * (sums.entries.t + tail);
    const float lower = exp2(out.outside.origin_s - out.all.origin_s);
    g.a = out.mass * lower * out.all.factor_s - out.slope * tail * out.outside.factor_s;
  }
  if (row.wants_lse() && alive) {
    const bool shared = mode == UnitTau::kShared;
    const float lse = all.max_s + ::logf(shared ? all.s : all.unit);
    out.unit = add_truth(row, lse, smoothing, label_logit, out.row) * out.all.factor_unit;
    const float lower = mode == UnitTau::kSeparate ? out.outside.origin_unit - out.all.origin_unit
                                                   : out.outside.origin_s - out.all.origin_s;
    (shared ? g.a : g.c) += out.unit * exp2(mode == UnitTau::kSquared ? 2 * lower : lower);
  }
  const bool lost = all.s != all.s;
  if (lost || is_bad(row, columns)) out.row.loss = __builtin_nanf("");
  g.failed = out.row.loss != out.row.loss;
  return out;
}

template <typename T>
KD_INLINE void write_outside(const Slice<T>& slice, int thread, int threads, const SparseOutcome& out, int label,
                             UnitTau mode, const GradientRow<T>& to) {
  const Gradient& g = out.row.gradient;
  const auto write = [&](auto of) { write_columns<false>(slice, thread, threads, label, g.label, to, of); };
  if (mode == UnitTau::kSquared)
    write([&](float x, float) { return student_gradient<UnitTau::kSquared>(x, g, out.outside); });
  else if (mode == UnitTau::kSeparate)
    write([&](float x, float) { return student_gradient<UnitTau::kSeparate>(x, g, out.outside); });
  else
    write([&](float x, float) { return student_gradient<UnitTau::kShared>(x, g, out.outside); });
}

// Must run after all threads of the block have written the columns outside.
template <typename T>
KD_INLINE void write_entries(const Slice<T>& slice, const EntriesView& entries, int thread, int threads,
                             const SparseOutcome& out, int label, UnitTau mode, const GradientRow<T>& to) {
  const Gradient& g = out.row.gradient;
  for (int64_t i = thread; i < entries.count; i += threads) {
    if (entries.is_padding(i)) continue;
    const int id = entries.id[i], at = id - slice.first;
    if (at < 0 || at >= slice.packs * Pack<T>::kLanes) continue;
    const float x = entries.logit[i], e = exp2(::fmaf(x, out.all.c.s, -out.all.origin_s));
    float value = ::fmaf(out.mass * out.all.factor_s, e, -out.slope * entries.weight[i]) - g.share;
    const float unit = mode == UnitTau::kSeparate ? exp2(::fmaf(x, kLog2e, -out.all.origin_unit))
                                                  : (mode == UnitTau::kSquared ? e * e : e);
    value = ::fmaf(out.unit, unit, value) - (id == label ? g.label : 0.0f);
    to.row[id] = from_float<T>(x == -kInf ? 0.0f : value);
  }
}

}  // namespace kdfast::cuda
