// One row of student logits against one of teacher logits, as the threads of a thread-block cluster share it.
//
// A row is read once. Every thread sweeps its packs of columns for sums of exponentials; sums are merged up the
// cluster; then the same threads look at the same packs again, which lie on the chip, and write the gradient. The
// functions here are one thread's part of each step, host and device: tests run them without a GPU.
#pragma once

#include "../divergence.h"
#include "pack.h"

namespace kdfast::cuda {

// What a row asks for; kdfast/reference.py says what it means.
struct RowCoefficients {
  float tau_s = 1, tau_t = 1;
  float kd = 0, ce = 0, z = 0;  // 0 takes the term out
  float smoothing = 0;
  int64_t label = -1;
  bool has_label = false;

  // The label's column, or one that no row has.
  KD_BOTH int label_column(int columns) const { return label >= 0 && label < columns ? int(label) : -1; }
  KD_BOTH bool counts() const { return kd != 0 || ce != 0 || z != 0; }
  KD_BOTH bool wants_ce() const { return ce != 0 && (has_label || smoothing == 1); }
  KD_BOTH bool wants_lse() const { return wants_ce() || z != 0; }
};

// How the student's exponentials at temperature 1, which cross-entropy and z-loss want, come from the tempered ones.
enum class AtOne { kNone, kShared, kSquared, kSeparate };

KD_BOTH AtOne at_one(const RowCoefficients& row) {
  if (row.kd == 0 || row.tau_s == 1) return AtOne::kShared;
  if (!row.wants_lse()) return AtOne::kNone;
  return row.tau_s == 2 ? AtOne::kSquared : AtOne::kSeparate;
}

// A thread block's part of the rows, in packs that are aligned as the student's row is in memory: columns before 0 and
// from `columns` on are padding in the packs that hold them.
template <typename T>
struct Slice {
  const Pack<T>*student, *teacher;
  int packs;
  int first;  // the column of the first pack's first lane; negative in padding
  int columns;

  KD_BOTH int column(int pack) const { return first + pack * Pack<T>::kLanes; }
  KD_BOTH bool has(int column) const { return column >= 0 && column < columns; }
  KD_BOTH bool is_whole(int pack) const { return has(column(pack)) && has(column(pack) + Pack<T>::kLanes - 1); }
};

// log2(e) / temperature: logits become exponents of 2. And how often the cross sum holds the teacher's own exponents:
// once in forward KL, not at all in soft cross-entropy.
struct Scales {
  float s, t;
  float entropy;
};

KD_BOTH Scales scales_of(const RowCoefficients& row, Kind kind) {
  if (row.kd == 0) return {kLog2e, kLog2e, 0};
  return {kLog2e / row.tau_s, kLog2e / row.tau_t, kind == Kind::kSoftCe ? 0.0f : 1.0f};
}

// Sums over some columns, relative to their largest logits: of 2^(x c - top c), and of the teacher's exponentials times
// the difference of both sides' exponents.
struct Sums {
  float top_s = -kInf, top_t = -kInf;
  float s = 0, t = 0, cross = 0;
  float one = 0;  // the student's at temperature 1, relative to top_s

  KD_BOTH bool are_finite() const { return ::fabsf(s + t + cross + one) < kInf; }
};

// What exponents are relative to. It is rounded, which does no harm as long as every exponent of a side, and every rise
// from one origin to another, is relative to the same number.
// Logits may be masked with the lowest finite number: neither an origin nor the product of a sum and a rise overflows.
KD_BOTH float origin_of(float top, float scale) { return ::fmaxf(product(top, scale), kLowest); }

KD_BOTH float rise_of(float from, float to, float scale) {
  return ::fminf(origin_of(to, scale) - origin_of(from, scale), 1e34f);
}

template <AtOne kAtOne>
KD_BOTH void raise_student(Sums& sums, float top, Scales c) {
  if (sums.top_s > -kInf) {
    const float rise = rise_of(sums.top_s, top, c.s), factor = exp2(-rise);
    sums.s *= factor;
    if constexpr (kAtOne == AtOne::kSquared) sums.one *= factor * factor;
    if constexpr (kAtOne == AtOne::kSeparate) sums.one *= exp2(-rise_of(sums.top_s, top, kLog2e));
    sums.cross += sums.t * rise;
  }
  sums.top_s = top;
}

KD_BOTH void raise_teacher(Sums& sums, float top, Scales c) {
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
KD_BOTH void sweep_pack(Sums& sums, const Pack<T>& student, const Pack<T>& teacher, Scales c) {
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
KD_BOTH void sweep_column(Sums& sums, float x, float y, Scales c) {
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
KD_BOTH void sweep_carefully(Sums& sums, const Slice<T>& slice, int pack, Scales c) {
#pragma unroll 1
  for (int i = 0; i < Pack<T>::kLanes; ++i) {
    if (!slice.has(slice.column(pack) + i)) continue;
    const float y = S::kTeacher ? to_float(slice.teacher[pack].lane[i]) : -kInf;
    sweep_column<S>(sums, to_float(slice.student[pack].lane[i]), y, c);
  }
}

// A thread's packs. Masked columns, NaN and overflow show in the sums: then everything is done again with care.
template <typename S, typename T>
KD_BOTH Sums sweep(const Slice<T>& slice, int thread, int threads, Scales c) {
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
KD_BOTH Sums sweep(const Slice<T>& slice, int thread, int threads, Scales c, bool teacher, AtOne mode) {
  if (!teacher) return sweep<Sweep<AtOne::kShared, false, false>>(slice, thread, threads, c);
  if (mode == AtOne::kSquared) return sweep<Sweep<AtOne::kSquared, true, kCross>>(slice, thread, threads, c);
  if (mode == AtOne::kSeparate) return sweep<Sweep<AtOne::kSeparate, true, kCross>>(slice, thread, threads, c);
  return sweep<Sweep<AtOne::kShared, true, kCross>>(slice, thread, threads, c);
}

// The sums over both sets of columns.
KD_BOTH Sums merge(Sums a, Sums b, Scales c, AtOne mode) {
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
KD_BOTH Smoothing smoothing_of(const Slice<T>& slice, int thread, int threads) {
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

// ---- divergences of probabilities --------------------------------------------------------------------------------

// What turns logits into probabilities, factor * 2^(x c - origin), and their logarithms.
struct Normaliser {
  Scales c;
  float origin_s, origin_t, origin_one;
  float factor_s, factor_t, factor_one;  // 0 where a side is masked throughout
  float log_s, log_t;                    // of the sums
};

KD_BOTH Normaliser normaliser_of(const Sums& sums, Scales c, AtOne mode) {
  Normaliser n = {c, 0, 0, 0, 0, 0, 0, ::logf(sums.s), ::logf(sums.t)};
  if (sums.top_s > -kInf) {
    n.origin_s = origin_of(sums.top_s, c.s);
    n.origin_one = origin_of(sums.top_s, kLog2e);
    n.factor_s = 1 / sums.s;
    n.factor_one = mode == AtOne::kShared ? n.factor_s : 1 / sums.one;
  }
  if (sums.top_t > -kInf) {
    n.origin_t = origin_of(sums.top_t, c.t);
    n.factor_t = 1 / sums.t;
  }
  return n;
}

KD_BOTH rowmath::Column<float> column_of(float x, float y, const Normaliser& n) {
  const float u = ::fmaf(x, n.c.s, -n.origin_s), v = ::fmaf(y, n.c.t, -n.origin_t);
  return {exp2(v) * n.factor_t, exp2(u) * n.factor_s, (v - u) * kLn2 + (n.log_s - n.log_t), v * kLn2 - n.log_t,
          u * kLn2 - n.log_s};
}

template <Kind kKind>
KD_BOTH rowmath::Element<float> element_of(const rowmath::Column<float>& column, const Divergence& divergence) {
  const rowmath::Limits<float> limits = {kLowest, kInf};
  const float log_a = -::logf(float(divergence.a)), log_rest = -::log1pf(-float(divergence.a));
  if constexpr (kKind == Kind::kReverseKl) return rowmath::reverse_kl(column, limits);
  if constexpr (kKind == Kind::kSymmetricKl) return rowmath::symmetric_kl(column, limits);
  if constexpr (kKind == Kind::kJsd) return rowmath::jsd(column, divergence.a, log_a, log_rest);
  if constexpr (kKind == Kind::kSkewForwardKl) return rowmath::skew_forward_kl(column, divergence.a, log_a, log_rest);
  if constexpr (kKind == Kind::kSkewReverseKl) return rowmath::skew_reverse_kl(column, divergence.a, log_a, log_rest);
  if constexpr (kKind == Kind::kTvd) return rowmath::tvd(column);
  return rowmath::alpha_beta(column, divergence.a, divergence.b, limits);
}

constexpr bool is_forward(Kind kind) { return kind == Kind::kForwardKl || kind == Kind::kSoftCe; }

using Values = rowmath::Element<float>;  // sums of them

template <Kind kKind, typename T>
KD_BOTH Values values_of(const Slice<T>& slice, int thread, int threads, const Normaliser& n,
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

// ---- the row's loss, and its gradient ------------------------------------------------------------------------------

// grad = a e_s + b e_t (or b h) + c e_s^2 (or c e_1) - share, with e exponentials relative to their origins; less
// `label` in the label's column, and 0 in masked ones.
struct Gradient {
  float a = 0, b = 0, c = 0, share = 0, label = 0;
  bool failed = false;  // NaN throughout
};

struct RowOutcome {
  float loss = 0;
  Gradient gradient;
};

KD_BOTH bool is_bad(const RowCoefficients& row, int columns) {
  const bool bad_tau = !(row.tau_s > 0 && row.tau_s < kInf && row.tau_t > 0 && row.tau_t < kInf);
  const bool bad_label = row.has_label && row.smoothing < 1 && (row.label < 0 || row.label >= columns);
  return (row.kd != 0 && bad_tau) || (row.ce != 0 && bad_label);
}

KD_BOTH float forward_value(const Sums& sums, Kind kind) {
  const float keep = kind == Kind::kSoftCe ? 0.0f : ::logf(sums.t);
  return sums.cross == kInf ? kInf : kLn2 * (sums.cross / sums.t) + (::logf(sums.s) - keep);
}

// Cross-entropy of the label's logit, smoothed.
KD_BOTH float cross_entropy(const RowCoefficients& row, float lse, float label_logit, const Smoothing& smoothing) {
  const float hard = row.smoothing < 1 ? lse - label_logit : 0.0f;
  if (row.smoothing == 0) return hard;
  const float smooth = lse - smoothing.logits / smoothing.count;
  return row.smoothing == 1 ? smooth : (1 - row.smoothing) * hard + row.smoothing * smooth;
}

// Loss and gradient from everything that was summed. `values` are those of divergences that are not forward.
KD_BOTH RowOutcome outcome_of(const RowCoefficients& row, const Divergence& divergence, int columns, const Sums& sums,
                              const Normaliser& n, const Values& values, const Smoothing& smoothing,
                              float label_logit) {
  RowOutcome out;
  Gradient& g = out.gradient;
  const bool forward = is_forward(divergence.kind);
  if (row.kd != 0 && n.factor_s != 0 && n.factor_t != 0) {
    const float slope = row.kd * float(divergence.scale) / row.tau_s;
    out.loss = row.kd * float(divergence.scale) * (forward ? forward_value(sums, divergence.kind) : values.value);
    g.a = (forward ? slope : -slope * values.h) * n.factor_s;
    g.b = forward ? -slope * n.factor_t : slope;
  }
  if (row.wants_lse() && n.factor_s != 0) {
    const bool shared = at_one(row) == AtOne::kShared;
    const float lse = sums.top_s + ::logf(shared ? sums.s : sums.one);
    float c = 0;
    if (row.wants_ce()) {
      out.loss += row.ce * cross_entropy(row, lse, label_logit, smoothing);
      c = row.ce;
      g.share = row.smoothing != 0 ? row.ce * row.smoothing / smoothing.count : 0.0f;
      g.label = row.ce * (1 - row.smoothing);
    }
    if (row.z != 0) {
      out.loss += row.z * lse * lse;
      c += 2 * row.z * lse;
    }
    (shared ? g.a : g.c) += c * n.factor_one;
  }
  // What a divergence selects away, a masked column or a vanishing probability, may have hidden a NaN.
  const bool lost = sums.s != sums.s || sums.t != sums.t;
  if (lost || is_bad(row, columns)) out.loss = __builtin_nanf("");
  g.failed = out.loss != out.loss;
  return out;
}

template <Kind kKind, AtOne kAtOne, bool kTeacher>
KD_BOTH float gradient_of(float x, float y, const Gradient& g, const Normaliser& n, const Divergence& divergence) {
  const float e = exp2(::fmaf(x, n.c.s, -n.origin_s));
  float value = ::fmaf(kAtOne == AtOne::kSquared ? ::fmaf(g.c, e, g.a) : g.a, e, -g.share);
  if constexpr (kAtOne == AtOne::kSeparate) value = ::fmaf(g.c, exp2(::fmaf(x, kLog2e, -n.origin_one)), value);
  if constexpr (!kTeacher) return value;
  if constexpr (is_forward(kKind))
    return ::fmaf(g.b, exp2(::fmaf(y, n.c.t, -n.origin_t)), value);
  else
    return g.b != 0 ? ::fmaf(g.b, element_of<kKind>(column_of(x, y, n), divergence).h, value) : value;
}

// Where a row's gradient goes: in whole packs where it is aligned as the student's row is.
template <typename T>
struct GradientRow {
  T* row;
  bool aligned;
};

template <typename T>
KD_BOTH void store(const GradientRow<T>& to, const Slice<T>& slice, int pack, const Pack<T>& value) {
  const int column = slice.column(pack);
  if (to.aligned && slice.is_whole(pack)) {
    *reinterpret_cast<Pack<T>*>(to.row + column) = value;
    return;
  }
#pragma unroll  // a lane that is chosen at run time would put the pack into local memory
  for (int i = 0; i < Pack<T>::kLanes; ++i)
    if (slice.has(column + i)) to.row[column + i] = value.lane[i];
}

template <Kind kKind, AtOne kAtOne, bool kTeacher, typename T>
KD_BOTH void write_gradient(const Slice<T>& slice, int thread, int threads, const Gradient& g, const Normaliser& n,
                            const Divergence& divergence, int label, const GradientRow<T>& to) {
  constexpr int kLanes = Pack<T>::kLanes;
  for (int pack = thread; pack < slice.packs; pack += threads) {
    float x[kLanes], y[kLanes], value[kLanes];
    const Pack<T> student = slice.student[pack];
    unpack(student, x);
    if constexpr (kTeacher) unpack(slice.teacher[pack], y);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] = gradient_of<kKind, kAtOne, kTeacher>(x[i], y[i], g, n, divergence);
    const int at = label - slice.column(pack);
    if (at >= 0 && at < kLanes) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) value[i] -= i == at ? g.label : 0.0f;
    }
    store(to, slice, pack, pack_unmasked(value, student));
  }
}

template <Kind kKind, typename T>
KD_BOTH void write_gradient(const Slice<T>& slice, int thread, int threads, const Gradient& g, const Normaliser& n,
                            const Divergence& divergence, bool teacher, int label, AtOne mode,
                            const GradientRow<T>& to) {
  if (!teacher)
    write_gradient<kKind, AtOne::kShared, false>(slice, thread, threads, g, n, divergence, label, to);
  else if (mode == AtOne::kSquared)
    write_gradient<kKind, AtOne::kSquared, true>(slice, thread, threads, g, n, divergence, label, to);
  else if (mode == AtOne::kSeparate)
    write_gradient<kKind, AtOne::kSeparate, true>(slice, thread, threads, g, n, divergence, label, to);
  else
    write_gradient<kKind, AtOne::kShared, true>(slice, thread, threads, g, n, divergence, label, to);
}

// The same number throughout: rows that do not count, and failed ones.
template <typename T>
KD_BOTH void fill_gradient(const Slice<T>& slice, int thread, int threads, float value, const GradientRow<T>& to) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < Pack<T>::kLanes; ++i) out.lane[i] = from_float<T>(value);
  for (int pack = thread; pack < slice.packs; pack += threads) store(to, slice, pack, out);
}

}  // namespace kdfast::cuda
