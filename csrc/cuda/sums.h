// Sums of exponentials over a row, as the threads of a thread-block cluster share it. Host and device.
//
// Every thread sweeps its packs of columns once, relative to the largest logit that it has met; sums are then merged up
// the cluster.
#pragma once

#include "../divergence.h"
#include "row.h"

namespace kdfast::cuda {

// log2(e) / temperature: logits become exponents of 2. And how often the cross sum holds the teacher's own exponents:
// once in forward KL, not at all in soft cross-entropy.
struct Scales {
  float s, t;
  float entropy;
};

KD_INLINE Scales scales_of(const RowCoefficients& row, Kind kind) {
  if (row.kd == 0) return {kLog2e, kLog2e, 0};
  return {kLog2e / row.tau_s, kLog2e / row.tau_t, kind == Kind::kSoftCe ? 0.0f : 1.0f};
}

// Sums over some columns, relative to their largest logits: of 2^(x c - top c), and of the teacher's exponentials times
// the difference of both sides' exponents.
struct Sums {
  float top_s = -kInf, top_t = -kInf;
  float s = 0, t = 0, cross = 0;
  float one = 0;  // the student's at temperature 1, relative to top_s

  KD_INLINE bool are_finite() const { return ::fabsf(s + t + cross + one) < kInf; }
};

// What exponents are relative to. It is rounded, which does no harm as long as every exponent of a side, and every rise
// from one origin to another, is relative to the same number.
// Logits may be masked with the lowest finite number: neither an origin nor the product of a sum and a rise overflows.
KD_INLINE float origin_of(float top, float scale) { return ::fmaxf(product(top, scale), kLowest); }

KD_INLINE float rise_of(float from, float to, float scale) {
  return ::fminf(origin_of(to, scale) - origin_of(from, scale), 1e34f);
}

template <AtOne kAtOne>
KD_INLINE void raise_student(Sums& sums, float top, Scales c) {
  if (sums.top_s > -kInf) {
    const float rise = rise_of(sums.top_s, top, c.s), factor = exp2(-rise);
    sums.s *= factor;
    if constexpr (kAtOne == AtOne::kSquared) sums.one *= factor * factor;
    if constexpr (kAtOne == AtOne::kSeparate) sums.one *= exp2(-rise_of(sums.top_s, top, kLog2e));
    sums.cross += sums.t * rise;
  }
  sums.top_s = top;
}

KD_INLINE void raise_teacher(Sums& sums, float top, Scales c) {
  if (sums.top_t > -kInf) {
    const float rise = rise_of(sums.top_t, top, c.t), factor = exp2(-rise);
    sums.cross = sums.cross == kInf ? kInf : factor * (sums.cross - c.entropy * sums.t * rise);
    sums.t *= factor;
  }
  sums.top_t = top;
}

// What a sweep adds up: both sides rather than the student alone; for forward KL and soft cross-entropy the cross sum.
template <AtOne kAt, bool kHasTeacher, bool kHasCross>
struct Sweep {
  static constexpr AtOne kAtOne = kAt;
  static constexpr bool kTeacher = kHasTeacher, kCross = kHasCross;
};

template <typename S, typename T>
KD_INLINE void sweep_pack(Sums& sums, const Pack<T>& student, const Pack<T>& teacher, Scales c) {
  constexpr int kLanes = Pack<T>::kLanes;
  float x[kLanes], y[kLanes];
  unpack(student, x);
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kLanes; ++i) top = ::fmaxf(top, x[i]);
  if (top > sums.top_s) raise_student<S::kAtOne>(sums, top, c);
  if constexpr (S::kTeacher) {
    unpack(teacher, y);
    top = y[0];
#pragma unroll
    for (int i = 1; i < kLanes; ++i) top = ::fmaxf(top, y[i]);
    if (top > sums.top_t) raise_teacher(sums, top, c);
  }
  const float origin_s = origin_of(sums.top_s, c.s), origin_t = origin_of(sums.top_t, c.t);
  const float origin_one = origin_of(sums.top_s, kLog2e);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const float u = ::fmaf(x[i], c.s, -origin_s), e = exp2(u);
    sums.s += e;
    if constexpr (S::kAtOne == AtOne::kSquared) sums.one = ::fmaf(e, e, sums.one);
    if constexpr (S::kAtOne == AtOne::kSeparate) sums.one += exp2(::fmaf(x[i], kLog2e, -origin_one));
    if constexpr (S::kTeacher) {
      const float v = ::fmaf(y[i], c.t, -origin_t), p = exp2(v);
      sums.t += p;
      if constexpr (S::kCross) sums.cross = ::fmaf(p, ::fmaf(c.entropy, v, -u), sums.cross);
    }
  }
}

// One column of any kind. Masked on one side it takes no part in that side's sums; a masked student's gap is infinite
// however small the teacher's probability there.
template <typename S>
KD_INLINE void sweep_column(Sums& sums, float x, float y, Scales c) {
  if (x > sums.top_s) raise_student<S::kAtOne>(sums, x, c);
  if (S::kTeacher && y > sums.top_t) raise_teacher(sums, y, c);
  const float u = ::fmaf(x, c.s, -origin_of(sums.top_s, c.s)), v = ::fmaf(y, c.t, -origin_of(sums.top_t, c.t));
  if (x != -kInf) {
    const float e = exp2(u);
    sums.s += e;
    if (S::kAtOne == AtOne::kSquared) sums.one += e * e;
    if (S::kAtOne == AtOne::kSeparate) sums.one += exp2(::fmaf(x, kLog2e, -origin_of(sums.top_s, kLog2e)));
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

// A thread's packs. Masked columns, NaN and overflow show in the sums: then everything is done again with care.
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
KD_INLINE Sums sweep(const Slice<T>& slice, int thread, int threads, Scales c, bool teacher, AtOne mode) {
  if (!teacher) return sweep<Sweep<AtOne::kShared, false, false>>(slice, thread, threads, c);
  if (mode == AtOne::kSquared) return sweep<Sweep<AtOne::kSquared, true, kCross>>(slice, thread, threads, c);
  if (mode == AtOne::kSeparate) return sweep<Sweep<AtOne::kSeparate, true, kCross>>(slice, thread, threads, c);
  return sweep<Sweep<AtOne::kShared, true, kCross>>(slice, thread, threads, c);
}

// The sums over both sets of columns.
KD_INLINE Sums merge(Sums a, Sums b, Scales c, AtOne mode) {
  const float top_s = ::fmaxf(a.top_s, b.top_s), top_t = ::fmaxf(a.top_t, b.top_t);
  Sums* const both[] = {&a, &b};
  for (Sums* part : both) {
    if (top_s > part->top_s) {
      if (mode == AtOne::kSquared)
        raise_student<AtOne::kSquared>(*part, top_s, c);
      else if (mode == AtOne::kSeparate)
        raise_student<AtOne::kSeparate>(*part, top_s, c);
      else
        raise_student<AtOne::kShared>(*part, top_s, c);
    }
    if (top_t > part->top_t) raise_teacher(*part, top_t, c);
  }
  return {top_s, top_t, a.s + b.s, a.t + b.t, a.cross + b.cross, a.one + b.one};
}

// Label smoothing's share: over the columns that are not masked.
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
