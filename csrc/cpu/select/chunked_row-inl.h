// A row of logits in chunks of columns. One full sweep computes every chunk's sum of exponentials; a search for few
// columns then looks again only at chunks that may hold one.

#if defined(KDFAST_CPU_SELECT_CHUNKED_ROW_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SELECT_CHUNKED_ROW_INL_H_
#undef KDFAST_CPU_SELECT_CHUNKED_ROW_INL_H_
#else
#define KDFAST_CPU_SELECT_CHUNKED_ROW_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "../row.h"
#include "../simd/load-inl.h"
#include "../simd/vec-inl.h"
#include "../softmax-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

template <typename T, typename From>
class ChunkedRow {
  using V = Vec<T>;

 public:
  ChunkedRow(const SelectTask& task, void* workspace)
      : task_(task), row_((const From*)task.logits.data), columns_(task.logits.size) {
    chunks_ = (columns_ + kSelectChunk - 1) / kSelectChunk;
    mass_ = (double*)workspace;
    origin_of_ = mass_ + chunks_;
    // Clamped so that products with it stay finite; temperatures beyond act like 0 and infinity.
    const double scale_log2 = kLog2E / task.temperature;
    scale_log2_ = T(scale_log2 < 1e-35 ? 1e-35 : scale_log2 > 1e35 ? 1e35 : scale_log2);
    lowest_ = T(-2 * Real<T>::kBias) / scale_log2_;
  }

 protected:
  static constexpr int kGroup = 16;  // columns added up together when a chunk is looked at

  // False where the row holds a NaN or +inf, or nothing but -inf.
  bool sweep() { return sum_chunks() && scale_chunks(); }

  double lse() const { return row_max_ / task_.temperature + ::log(sum_exp_); }
  double mass_of(double logit) const { return ::exp2((logit - row_max_) * double(scale_log2_)); }  // of sum_exp_

  // Chunk k; the last one padded with -inf.
  const From* chunk(int64_t k) {
    const int64_t begin = k * kSelectChunk;
    if (begin + kSelectChunk <= columns_) return row_ + begin;
    for (int i = 0; i < kSelectChunk; ++i)
      if (begin + i < columns_)
        padded_[i] = row_[begin + i];
      else
        from_real(-Real<double>::kInf, padded_ + i);
    return padded_;
  }

  // The chunk's exponentials, and their sums by group and in all; in double, so that small columns keep their share.
  void exponentiate(int64_t k) {
    origin_ = T(origin_of_[k]);
    const From* x = chunk(k);
    for (int i = 0; i < kSelectChunk; i += V::kLanes) power(load_vector<T>(x + i)).store(e_ + i);
    sum_ = 0;
    for (int g = 0; g < kSelectChunk / kGroup; ++g) {
      Vec<double> sum(0.0);
      for (int i = 0; i < kGroup; i += Vec<double>::kLanes) sum = sum + widened(e_ + g * kGroup + i);
      groups_[g] = reduce_add(sum);
      sum_ += groups_[g];
    }
  }

  const SelectTask& task_;
  const From* row_;
  const int64_t columns_;
  int64_t chunks_;
  double *mass_, *origin_of_;     // (chunks,) each
  double sum_exp_ = 0, sum_ = 0;  // of the row; of the chunk that was looked at
  double groups_[kSelectChunk / kGroup];
  T e_[kSelectChunk];

 private:
  // Each chunk's sum of exponentials, relative to an origin not far below the largest logit so far. False where a logit
  // is NaN or +inf. The first origin lies below every logit, so that a chunk of -inf has sum 0.
  bool sum_chunks() {
    for (int64_t k = 0; k < chunks_; ++k) {
      const From* x = chunk(k);
      T sum = sum_of(x);
      if (!is_sound(sum)) {
        origin_ = maximum<T>(x, kSelectChunk);
        sum = sum_of(x);
        if (!is_sound(sum)) return false;
      }
      mass_[k] = double(sum);
      origin_of_[k] = double(origin_);
    }
    row_max_ = double(origin_);
    return true;
  }

  // Rescales all sums to the last origin, the highest one. False where no column is finite.
  bool scale_chunks() {
    double origin = row_max_, scale = 1;
    for (int64_t k = 0; k < chunks_; ++k) {
      if (origin_of_[k] != origin) {
        origin = origin_of_[k];
        scale = ::exp2((origin - row_max_) * double(scale_log2_));
      }
      mass_[k] *= scale;
      sum_exp_ += mass_[k];
    }
    return sum_exp_ > 0;
  }

  T sum_of(const From* x) const {
    V sum(T(0));
    for (int i = 0; i < kSelectChunk; i += V::kLanes) sum = sum + power(load_vector<T>(x + i));
    return reduce_add(sum);
  }

  // 0 at -inf, NaN at NaN.
  KD_INLINE V power(V x) const {
    const V scale_log2(scale_log2_);
#if KDFAST_VEC_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      // Clamped to the lowest exponent: -inf would give NaN.
      const V d = max(V(lowest_), x - V(origin_)), round(Real<T>::kRound);
      const V n = (d * scale_log2 + round) - round;
      const V y = horner(Real<T>::kExp2Short, d * scale_log2 - n);
      return V((typename V::Value)_mm512_scalef_ps((__m512)y.v, (__m512)n.v));
    }
#endif
    return exp2((x - V(origin_)) * scale_log2);
  }

  static KD_INLINE Vec<double> widened(const double* from) { return Vec<double>::load(from); }
  static KD_INLINE Vec<double> widened(const float* from) {
    typedef float Floats __attribute__((vector_size(KDFAST_VEC_BYTES / 2)));
    Floats floats;
    __builtin_memcpy(&floats, from, sizeof floats);
    return __builtin_convertvector(floats, Vec<double>::Value);
  }

  // Whether a chunk's sum is usable. Exponentials of logits far above the origin lose digits; farther still they become
  // an infinity of either sign, or NaN.
  static bool is_sound(T sum) { return sum >= T(0) && sum < T(0x1p16); }

  double row_max_ = 0;
  T scale_log2_, lowest_, origin_ = -Real<T>::kMax;
  From padded_[kSelectChunk];
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
