// Sums of exponentials over a row, as the threads of a thread-block cluster share it. Host and device.
//
// Online softmax: every thread sweeps its packs of columns once, with sums relative to the largest logit that it has
// met; the threads' sums are then merged across the cluster.
#pragma once

#include "../divergence.h"
#include "row.h"

namespace kdfast::cuda {

// s, t: log2(e) / temperature of each side, which makes logits exponents of 2. entropy: the weight of the teacher's own
// exponents in the cross sum, 1 for forward KL and 0 for soft cross-entropy.
struct Scales {
  float s, t;
  float entropy;
};

KD_INLINE Scales scales_of(const RowCoefficients& row, Kind kind) {
  if (row.kd == 0) return {kLog2e, kLog2e, 0};
  return {kLog2e / row.tau_s, kLog2e / row.tau_t, kind == Kind::kSoftCe ? 0.0f : 1.0f};
}

// Sums over some columns, relative to their largest logits: s and t of each side's 2^(x c - max c), cross of the
// teacher's exponentials times the difference of both sides' exponents.
struct Sums {
  float max_s = -kInf, max_t = -kInf;
  float s = 0, t = 0, cross = 0;
  float unit = 0;  // the student's at temperature 1, relative to max_s

  KD_INLINE bool are_finite() const { return ::fabsf(s + t + cross + unit) < kInf; }
};

// What a side's exponents are relative to: the maximum's, rounded. The rounding is harmless as long as every exponent,
// and every rise from one origin to the next, uses the same rounded number. Users may mask logits with the lowest
// finite number: clamping keeps an origin, and the product of a sum and a rise, finite.
KD_INLINE float origin_of(float row_max, float scale) { return ::fmaxf(product(row_max, scale), kLowest); }

KD_INLINE float rise_of(float from, float to, float scale) {
  return ::fminf(origin_of(to, scale) - origin_of(from, scale), 1e34f);
}

template <UnitTau kUnitTau>
KD_INLINE void raise_student(Sums& sums, float row_max, Scales c) {
  if (sums.max_s > -kInf) {
    const float rise = rise_of(sums.max_s, row_max, c.s), factor = exp2(-rise);
    sums.s *= factor;
    if constexpr (kUnitTau == UnitTau::kSquared) sums.unit *= factor * factor;
    if constexpr (kUnitTau == UnitTau::kSeparate) sums.unit *= exp2(-rise_of(sums.max_s, row_max, kLog2e));
    sums.cross += sums.t * rise;
  }
  sums.max_s = row_max;
}

KD_INLINE void raise_teacher(Sums& sums, float row_max, Scales c) {
  if (sums.max_t > -kInf) {
    const float rise = rise_of(sums.max_t, row_max, c.t), factor = exp2(-rise);
    sums.cross = sums.cross == kInf ? kInf : factor * (sums.cross - c.entropy * sums.t * rise);
    sums.t *= factor;
  }
  sums.max_t = row_max;
}

// What a sweep sums: where the student's sum at temperature 1 comes from; the teacher's side too; the cross sum, which
// the family Forward needs.
template <UnitTau kUnit, bool kHasTeacher, bool kHasCross>
struct Sweep {
  static constexpr UnitTau kUnitTau = kUnit;
  static constexpr bool kTeacher = kHasTeacher, kCross = kHasCross;
};

template <typename S, typename T>
KD_INLINE void sweep_pack(Sums& sums, const Pack<T>& student, const Pack<T>& teacher, Scales c) {
  constexpr int kLanes = Pack<T>::kLanes;
  float x[kLanes], y[kLanes];
  unpack(student, x);
  float row_max = x[0];
#pragma unroll
  for (int i = 1; i < kLanes; ++i) row_max = ::fmaxf(row_max, x[i]);
  if (row_max > sums.max_s) raise_student<S::kUnitTau>(sums, row_max, c);
  if constexpr (S::kTeacher) {
    unpack(teacher, y);
    row_max = y[0];
#pragma unroll
    for (int i = 1; i < kLanes; ++i) row_max = ::fmaxf(row_max, y[i]);
    if (row_max > sums.max_t) raise_teacher(sums, row_max, c);
  }
  const float origin_s = origin_of(sums.max_s, c.s), origin_t = origin_of(sums.max_t, c.t);
  const float origin_unit = origin_of(sums.max_s, kLog2e);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const float u = ::fmaf(x[i], c.s, -origin_s), e = exp2(u);
    sums.s += e;
    if constexpr (S::kUnitTau == UnitTau::kSquared) sums.unit = ::fmaf(e, e, sums.unit);
    if constexpr (S::kUnitTau == UnitTau::kSeparate) sums.unit += exp2(::fmaf(x[i], kLog2e, -origin_unit));
    if constexpr (S::kTeacher) {
      const float v = ::fmaf(y[i], c.t, -origin_t), p = exp2(v);
      sums.t += p;
      if constexpr (S::kCross) sums.cross = ::fmaf(p, ::fmaf(c.entropy, v, -u), sums.cross);
    }
  }
}

// One column, masked or not. A side that masks it leaves it out of its sums. Where the student masks a column that the
// teacher does not, the cross sum is infinite, however small the teacher's probability.
template <typename S>
KD_INLINE void sweep_column(Sums& sums, float x, float y, Scales c) {
  if (x > sums.max_s) raise_student<S::kUnitTau>(sums, x, c);
  if (S::kTeacher && y > sums.max_t) raise_teacher(sums, y, c);
  const float u = ::fmaf(x, c.s, -origin_of(sums.max_s, c.s)), v = ::fmaf(y, c.t, -origin_of(sums.max_t, c.t));
  if (x != -kInf) {
    const float e = exp2(u);
    sums.s += e;
    if (S::kUnitTau == UnitTau::kSquared) sums.unit += e * e;
    if (S::kUnitTau == UnitTau::kSeparate) sums.unit += exp2(::fmaf(x, kLog2e, -origin_of(sums.max_s, kLog2e)));
  }
  if (!S::kTeacher || y == -kInf) return;
  const float p = exp2(v);
  sums.t += p;
  if (S::kCross && x == -kInf) sums.cross = kInf;
  if (S::kCross && p > 0) sums.cross += p * ::fmaf(c.entropy, v, -u);
}

template <typename S, typename T>
KD_INLINE void sweep_carefully(Sums& sums, const Slice<T>& slice, int pack, Scales c) {
#pragma unroll 1
  for (int i = 0; i < Pack<T>::kLanes; ++i) {
    if (!slice.has(slice.column(pack) + i)) continue;
    const float y = S::kTeacher ? to_float(slice.teacher[pack].lane[i]) : -kInf;
    sweep_column<S>(sums, to_float(slice.student[pack].lane[i]), y, c);
  }
}

// Sums a thread's packs. Masked columns, NaN and overflow make a sum infinite or NaN: then the packs are swept again,
// column by column.
template <typename S, typename T>
KD_INLINE Sums sweep(const Slice<T>& slice, int thread, int threads, Scales c) {
  Sums sums;
  for (int pack = thread; pack < slice.packs; pack += threads) {
    if (slice.is_whole(pack))
      sweep_pack<S>(sums, slice.student[pack], slice.teacher[pack], c);
    else
      sweep_carefully<S>(sums, slice, pack, c);
  }
  if (sums.are_finite()) return sums;
  sums = Sums();
#pragma unroll 1
  for (int pack = thread; pack < slice.packs; pack += threads) sweep_carefully<S>(sums, slice, pack, c);
  return sums;
}

template <bool kCross, typename T>
KD_INLINE Sums sweep(const Slice<T>& slice, int thread, int threads, Scales c, bool teacher, UnitTau mode) {
  if (!teacher) return sweep<Sweep<UnitTau::kShared, false, false>>(slice, thread, threads, c);
  if (mode == UnitTau::kSquared) return sweep<Sweep<UnitTau::kSquared, true, kCross>>(slice, thread, threads, c);
  if (mode == UnitTau::kSeparate) return sweep<Sweep<UnitTau::kSeparate, true, kCross>>(slice, thread, threads, c);
  return sweep<Sweep<UnitTau::kShared, true, kCross>>(slice, thread, threads, c);
}

// The sums over the columns of both.
KD_INLINE Sums merge(Sums a, Sums b, Scales c, UnitTau mode) {
  const float max_s = ::fmaxf(a.max_s, b.max_s), max_t = ::fmaxf(a.max_t, b.max_t);
  Sums* const both[] = {&a, &b};
  for (Sums* part : both) {
    if (max_s > part->max_s) {
      if (mode == UnitTau::kSquared)
        raise_student<UnitTau::kSquared>(*part, max_s, c);
      else if (mode == UnitTau::kSeparate)
        raise_student<UnitTau::kSeparate>(*part, max_s, c);
      else
        raise_student<UnitTau::kShared>(*part, max_s, c);
    }
    if (max_t > part->max_t) raise_teacher(*part, max_t, c);
  }
  return {max_s, max_t, a.s + b.s, a.t + b.t, a.cross + b.cross, a.unit + b.unit};
}

// What label smoothing needs: the sum and the number of the logits that are not masked.
struct Smoothing {
  float logits = 0, count = 0;
};

template <typename T>
KD_INLINE Smoothing smoothing_of(const Slice<T>& slice, int thread, int threads) {
  Smoothing sum;
  for (int pack = thread; pack < slice.packs; pack += threads)
    for (int i = 0; i < Pack<T>::kLanes; ++i) {
      const float x = to_float(slice.student[pack].lane[i]);
      if (!slice.has(slice.column(pack) + i) || x == -kInf) continue;
      sum.logits += x;
      sum.count += 1;
    }
  return sum;
}

}  // namespace kdfast::cuda
