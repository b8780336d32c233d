// One side's softmax, tile by tile, straight from the logits: exponentials 2^((x - origin) log2(e) / tau) with an
// origin per tile, and a factor per tile that turns them into probabilities.
//
// The origin need not be the tile's maximum, only near it: the maximum of the tile's first few logits serves, which
// saves a sweep. A tile whose sums come out too large is computed again with its true maximum.

#if defined(KDFAST_CPU_SOFTMAX_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SOFTMAX_INL_H_
#undef KDFAST_CPU_SOFTMAX_INL_H_
#else
#define KDFAST_CPU_SOFTMAX_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "../rowmath.h"
#include "simd/load-inl.h"
#include "simd/vec-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

// Columns of a tile: 64 additions per lane in float, whatever the vector's width, before sums continue in double.
constexpr int kTile = 16 * KDFAST_VEC_BYTES;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

KD_INLINE int64_t tile_count(int64_t columns) { return (columns + kTile - 1) / kTile; }
KD_INLINE bool is_finite(double x) { return x - x == 0; }

template <typename T>
struct Exponentials {
  T* e = nullptr;            // (columns,)
  double* offset = nullptr;  // (tiles,) origin log2(e) / tau; -inf where no column of the tile is finite
  double* sum = nullptr;     // (tiles,)
  double* factor = nullptr;  // (tiles,)
  int64_t columns = 0;
  T scale_log2 = T(kLog2E);  // log2(e) / tau
  double row_max = -Real<double>::kInf,
         sum_exp = 0;  // of the row: the largest offset; 0 exactly where every column is -inf
  double log_sum = 0;

  void set_tau(double tau) { scale_log2 = T(kLog2E / tau); }
  // 1 / tau, rounded as the exponentials' scale is.
  double inverse_tau() const { return double(scale_log2) * kLn2; }

  // The row's statistics from its tiles'. A logit of NaN or +inf makes sum_exp NaN.
  void finish() {
    const int64_t tiles = tile_count(columns);
    for (int64_t k = 0; k < tiles; ++k) row_max = offset[k] > row_max ? offset[k] : row_max;
    for (int64_t k = 0; k < tiles; ++k) sum_exp += sum[k] * relative(k);
    if (!is_finite(sum_exp)) sum_exp = __builtin_nan("");
    normalize();
  }
  // Adds the logit of a column that no tile holds. Call normalize() after the last one.
  void include(double x) {
    if (x == -Real<double>::kInf) return;
    const double u = x * scale_log2, raised = u > row_max ? u : row_max;
    if (sum_exp != 0) sum_exp *= ::exp2(row_max - raised);
    sum_exp += ::exp2(u - raised);
    row_max = raised;
  }
  void normalize() {
    log_sum = ::log(sum_exp);
    for (int64_t k = 0; k < tile_count(columns); ++k) factor[k] = sum_exp == 0 ? 0 : relative(k) / sum_exp;
  }
  // A tile's scale relative to row_max. A tile without a finite column has no offset, and its sum is 0 or NaN.
  double relative(int64_t k) const {
    return offset[k] == row_max || offset[k] == -Real<double>::kInf ? 1 : ::exp2(offset[k] - row_max);
  }

  // The row's log-sum-exp in nats.
  double lse() const { return row_max * kLn2 + log_sum; }
  // log q of a column with logit x. A product of two floats is exact in double, so large logits cancel exactly.
  double log_probability(double x) const { return (x * double(scale_log2) - row_max) * kLn2 - log_sum; }
  // log of tile k's factor.
  double log_factor(int64_t k) const { return (offset[k] - row_max) * kLn2 - log_sum; }
  T probability(int64_t column) const { return e[column] * T(factor[column / kTile]); }
};

// Logits as exponents of 2, relative to an origin. Subtracting before scaling keeps large logits accurate.
template <typename T>
struct Base2 {
  T scale_log2 = 0, origin = 0;
  bool is_placed = true;  // the origin is a logit's
  KD_INLINE Vec<T> operator()(Vec<T> x) const { return (x - Vec<T>(origin)) * Vec<T>(scale_log2); }
  double offset() const { return double(origin) * double(scale_log2); }
};

// The map that tile k's exponentials were made with.
template <typename T>
Base2<T> origin_of(const Exponentials<T>& side, int64_t k) {
  const double offset = side.offset[k];
  return {side.scale_log2, is_finite(offset) ? T(offset / double(side.scale_log2)) : T(0)};
}

template <typename T>
struct TileSums {
  T student, teacher, square, cross;
  T logits;  // sum of the logits, not finite where one is masked; 0 where `cross` shows that
};

// The sum that a forward divergence's value needs, with exponents u of the student and v of the teacher, in log2 units:
// e_t (v - u) for KL, -e_t u for cross-entropy.
enum class Cross { kNone, kKl, kCe };

// What one sweep over a tile computes besides the student's exponentials.
struct SweepMode {
  bool teacher = false;  // the teacher's exponentials
  bool square = false;   // sum of e_s^2: the student's at temperature 1 where tau is 2
  Cross cross = Cross::kNone;
  bool careful = false;  // handles logits of -inf, which otherwise make a sum infinite or NaN
};

template <bool kTeacher, bool kSquare, Cross kCross, typename T, typename From>
class Sweep {
  using V = Vec<T>;

 public:
  Sweep(Base2<T> s, Base2<T> t) : s_(s), t_(t) {}

  // Adds `kVectors` vectors, stage by stage, so that their latencies overlap. kCareful: see SweepMode::careful.
  template <bool kCareful, int kVectors, typename Logit>
  KD_INLINE void add(const Logit* x, const Logit* y, T* e_s, T* e_t) {
    V u[kVectors], v[kVectors], a[kVectors], b[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      const V logit_s = load_vector<T>(x + k * V::kLanes);
      u[k] = s_(logit_s);
      if (kCross == Cross::kNone && !kCareful) logits_ = logits_ + logit_s;
      if (!kTeacher) continue;
      const V logit_t = load_vector<T>(y + k * V::kLanes);
      v[k] = t_(logit_t);
      if (kCross == Cross::kNone && !kCareful) logits_ = logits_ + logit_t;
    }
    for (int k = 0; k < kVectors; ++k) {
      a[k] = power<kCareful>(u[k]);
      if (kTeacher) b[k] = power<kCareful>(v[k]);
    }
    for (int k = 0; k < kVectors; ++k) {
      a[k].store(e_s + k * V::kLanes);
      sum_s_ = sum_s_ + a[k];
      if (kSquare) square_ = a[k] * a[k] + square_;
      if (!kTeacher) continue;
      b[k].store(e_t + k * V::kLanes);
      sum_t_ = sum_t_ + b[k];
      if (kCross != Cross::kNone) cross_ = cross<kCareful>(u[k], v[k], b[k]) + cross_;
    }
  }

  // Adds one vector of which only the lanes in `counts` are new.
  template <bool kCareful>
  KD_INLINE void add_partly(const From* x, const From* y, T* e_s, T* e_t, Mask<T> counts) {
    Sweep part(s_, t_);
    part.template add<kCareful, 1>(x, y, e_s, e_t);
    const V zero(T(0));
    sum_s_ = sum_s_ + select(counts, part.sum_s_, zero);
    sum_t_ = sum_t_ + select(counts, part.sum_t_, zero);
    square_ = square_ + select(counts, part.square_, zero);
    cross_ = cross_ + select(counts, part.cross_, zero);
    logits_ = logits_ + select(counts, part.logits_, zero);
  }

  KD_INLINE TileSums<T> sums() const {
    return {reduce_add(sum_s_), kTeacher ? reduce_add(sum_t_) : T(0), kSquare ? reduce_add(square_) : T(0),
            kCross == Cross::kNone ? T(0) : reduce_add(cross_), kCross == Cross::kNone ? reduce_add(logits_) : T(0)};
  }

 private:
  template <bool kCareful>
  static KD_INLINE V cross(V u, V v, V b) {
    const V gap = kCross == Cross::kKl ? v - u : -u;
    if constexpr (kCareful)
      return rowmath::weighted(b, v, gap, rowmath::Limits<V>{V(-Real<T>::kMax), V(Real<T>::kInf)});
    return b * gap;
  }

  template <bool kCareful>
  static KD_INLINE V power(V x) {
    if constexpr (kCareful) return exp2(x);
    return exp2_finite<sizeof(From) == 2>(x);
  }

  Base2<T> s_, t_;
  V sum_s_ = V(T(0)), sum_t_ = V(T(0)), square_ = V(T(0)), cross_ = V(T(0)), logits_ = V(T(0));
};

template <bool kTeacher, bool kSquare, Cross kCross, bool kCareful, typename T, typename From>
TileSums<T> exponentiate(int count, const From* x, const From* y, Base2<T> s, Base2<T> t, T* e_s, T* e_t) {
  constexpr int kLanes = Vec<T>::kLanes;
  Sweep<kTeacher, kSquare, kCross, T, From> sweep(s, t);
  const int whole = count / kLanes * kLanes, paired = whole / (2 * kLanes) * (2 * kLanes);
  for (int i = 0; i < paired; i += 2 * kLanes) sweep.template add<kCareful, 2>(x + i, y + i, e_s + i, e_t + i);
  if (paired < whole) sweep.template add<kCareful, 1>(x + paired, y + paired, e_s + paired, e_t + paired);
  if (whole == count) return sweep.sums();
  // Zeros to the end of the last vector; the code below overwrites those that stand for columns.
  Vec<T>(T(0)).store(e_s + whole);
  if (kTeacher) Vec<T>(T(0)).store(e_t + whole);
  if (whole > 0) {
    // Load the last `kLanes` columns again, and count only those that no vector before held.
    const int last = count - kLanes;
    const Mask<T> counts = lane_numbers<T>() > Vec<T>(T(whole - last) - T(0.5));
    sweep.template add_partly<kCareful>(x + last, y + last, e_s + last, e_t + last, counts);
    return sweep.sums();
  }
  T rest_x[kLanes], rest_y[kLanes], logits = 0;
  for (int i = 0; i < kLanes; ++i) rest_x[i] = rest_y[i] = -Real<T>::kInf;
  for (int i = 0; i < count; ++i) {
    rest_x[i] = T(to_real(x[i]));
    if (kTeacher) rest_y[i] = T(to_real(y[i]));
    logits += rest_x[i];
  }
  // The padding is -inf, so the sweep is careful, and the check for masks must use the row's own logits alone.
  sweep.template add<true, 1>(rest_x, rest_y, e_s, e_t);
  TileSums<T> sums = sweep.sums();
  sums.logits += logits;
  return sums;
}

template <typename T, typename From>
TileSums<T> exponentiate(SweepMode mode, int count, const From* x, const From* y, Base2<T> s, Base2<T> t, T* e_s,
                         T* e_t) {
#define KD_SWEEP(teacher, square, cross)                                                  \
  (mode.careful ? exponentiate<teacher, square, cross, true>(count, x, y, s, t, e_s, e_t) \
                : exponentiate<teacher, square, cross, false>(count, x, y, s, t, e_s, e_t))
#define KD_SWEEP_SQUARE(teacher, cross) (mode.square ? KD_SWEEP(teacher, true, cross) : KD_SWEEP(teacher, false, cross))
  if (!mode.teacher) return KD_SWEEP_SQUARE(false, Cross::kNone);
  if (mode.cross == Cross::kNone) return KD_SWEEP_SQUARE(true, Cross::kNone);
  if (mode.cross == Cross::kCe) return KD_SWEEP_SQUARE(true, Cross::kCe);
  return KD_SWEEP_SQUARE(true, Cross::kKl);
#undef KD_SWEEP_SQUARE
#undef KD_SWEEP
}

// The largest of `count` logits, ignoring NaN; -inf where there is none.
template <typename T, typename From>
T maximum(const From* x, int count) {
  using V = Vec<T>;
  T largest = -Real<T>::kInf;
  int i = 0;
  if (count >= V::kLanes) {
    V lanes(largest);
    for (; i + V::kLanes <= count; i += V::kLanes) lanes = max(load_vector<T>(x + i), lanes);
    largest = reduce_max(lanes);
  }
  for (; i < count; ++i) {
    const T value = T(to_real(x[i]));
    largest = value > largest ? value : largest;
  }
  return largest;
}

// Exponents relative to the largest of the first `count` logits; relative to 0 where none is finite.
template <typename T, typename From>
Base2<T> base2(T scale_log2, const From* x, int count) {
  const T largest = maximum<T>(x, count);
  const bool is_placed = is_finite(largest);
  return {scale_log2, is_placed ? largest : T(0), is_placed};
}

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
