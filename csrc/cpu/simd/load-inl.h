// Loads and stores: rows of any dtype from and to vectors and tiles of the working type.

#if defined(KDFAST_CPU_SIMD_LOAD_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SIMD_LOAD_INL_H_
#undef KDFAST_CPU_SIMD_LOAD_INL_H_
#else
#define KDFAST_CPU_SIMD_LOAD_INL_H_
#endif

#include <cstdint>

#include "../row.h"
#include "half.h"
#include "vec-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

KD_INLINE float to_real(float x) { return x; }
KD_INLINE double to_real(double x) { return x; }
KD_INLINE float to_real(Half x) { return half_to_float(x.bits); }
KD_INLINE float to_real(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

KD_INLINE void from_real(double x, float* to) { *to = float(x); }
KD_INLINE void from_real(double x, double* to) { *to = x; }
KD_INLINE void from_real(double x, Half* to) { to->bits = half_from_float(float(x)); }
// Rounds to nearest even. A NaN whose payload the rounding would carry into the sign does not occur: rows with a NaN
// are filled with the quiet one.
KD_INLINE void from_real(double x, BFloat16* to) {
  const float value = float(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- vectors: one per (working type, dtype) pair that a kernel reads without staging -------------------------------

template <typename T>
KD_INLINE Vec<T> load_vector(const T* from) {
  return Vec<T>::load(from);
}
template <typename T>
KD_INLINE void store_vector(Vec<T> x, T* to) {
  x.store(to);
}

typedef uint16_t Words __attribute__((vector_size(KDFAST_VEC_BYTES / 2)));
typedef uint32_t DoubleWords __attribute__((vector_size(KDFAST_VEC_BYTES)));

template <typename T>
KD_INLINE Vec<T> load_vector(const BFloat16* from) {
  Words words;
  __builtin_memcpy(&words, from, sizeof words);
  return Vec<T>((typename Vec<T>::Value)(__builtin_convertvector(words, DoubleWords) << 16));
}
KD_INLINE void store_vector(Vec<float> x, BFloat16* to) {
  const DoubleWords bits = (DoubleWords)x.v;
  const Words words = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Words);
  __builtin_memcpy(to, &words, sizeof words);
}

template <typename T>
KD_INLINE Vec<T> load_vector(const Half* from) {
#if KDFAST_VEC_BYTES == 64
  return Vec<T>((typename Vec<T>::Value)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
#elif KDFAST_VEC_BYTES == 32
  return Vec<T>((typename Vec<T>::Value)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
#else
  Vec<T> x;
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.v[i] = to_real(from[i]);
  return x;
#endif
}
KD_INLINE void store_vector(Vec<float> x, Half* to) {
#if KDFAST_VEC_BYTES == 64
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x.v, 0));
#elif KDFAST_VEC_BYTES == 32
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x.v, 0));
#else
  for (int i = 0; i < Vec<float>::kLanes; ++i) from_real(x.v[i], to + i);
#endif
}

// A non-temporal store, for memory that is not read soon: a plain store would first fetch the cache line that it
// overwrites. `to` is aligned to the vector.
template <typename T, typename To>
KD_INLINE void stream_vector(Vec<T> x, To* to) {
#if KDFAST_VEC_BYTES >= 32
  alignas(64) To packed[Vec<T>::kLanes];
  store_vector(x, packed);
#if KDFAST_VEC_BYTES == 64
  if constexpr (sizeof packed == 64) return _mm512_stream_si512((__m512i*)to, _mm512_load_si512(packed));
#endif
  if constexpr (sizeof packed == 32) return _mm256_stream_si256((__m256i*)to, _mm256_load_si256((__m256i*)packed));
  if constexpr (sizeof packed == 16) return _mm_stream_si128((__m128i*)to, _mm_load_si128((__m128i*)packed));
#else
  store_vector(x, to);
#endif
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Calls visit(typed pointer) for the dtype at hand.
template <typename F>
KD_INLINE void with_type(const void* data, Dtype dtype, F visit) {
  switch (dtype) {
    case Dtype::kFloat:
      return visit((const float*)data);
    case Dtype::kDouble:
      return visit((const double*)data);
    case Dtype::kHalf:
      return visit((const Half*)data);
    case Dtype::kBFloat16:
      return visit((const BFloat16*)data);
  }
}

template <typename To>
KD_INLINE To* writable(const To* data) {
  return const_cast<To*>(data);
}

template <typename T, typename From>
KD_INLINE void convert_in(const From* from, int count, T* to) {
  int i = 0;
  if constexpr (sizeof(T) == 4 && sizeof(From) <= 4)
    for (; i + Vec<T>::kLanes <= count; i += Vec<T>::kLanes) load_vector<T>(from + i).store(to + i);
  for (; i < count; ++i) to[i] = T(to_real(from[i]));
}

template <typename T, typename To>
KD_INLINE void convert_out(const T* from, int count, To* to) {
  int i = 0;
  if constexpr (sizeof(T) == 4 && sizeof(To) <= 4)
    for (; i + Vec<T>::kLanes <= count; i += Vec<T>::kLanes) store_vector(Vec<T>::load(from + i), to + i);
  for (; i < count; ++i) from_real(from[i], to + i);
}

// Values [begin, begin + count) of a row.
template <typename T>
inline void load(const Source& row, int64_t begin, int count, T* to) {
  with_type(row.data, row.dtype, [&](auto* from) { convert_in(from + begin, count, to); });
}

template <typename T>
inline void store(const T* from, int count, void* row, Dtype dtype, int64_t begin) {
  with_type(row, dtype, [&](auto* to) { convert_out(from, count, writable(to) + begin); });
}

inline double load_one(const Source& row, int64_t at) {
  double value = 0;
  with_type(row.data, row.dtype, [&](auto* from) { value = to_real(from[at]); });
  return value;
}

inline void store_one(double value, void* row, Dtype dtype, int64_t at) { store(&value, 1, row, dtype, at); }

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
