// SIMD values of one ISA, on the compiler's vector extensions, with their own exp2 and log.
// KDFAST_VEC_BYTES is the register width.

#if defined(KDFAST_CPU_SIMD_VEC_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SIMD_VEC_INL_H_
#undef KDFAST_CPU_SIMD_VEC_INL_H_
#else
#define KDFAST_CPU_SIMD_VEC_INL_H_
#endif

#include <cmath>
#include <cstdint>

// AVX-512's intrinsics leave some vectors undefined on purpose. GCC 12 warns of them wherever it inlines one.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include "../../target.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

template <typename T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Value __attribute__((vector_size(KDFAST_VEC_BYTES)));
  typedef int32_t Int __attribute__((vector_size(KDFAST_VEC_BYTES)));
};
template <>
struct VecTypes<double> {
  typedef double Value __attribute__((vector_size(KDFAST_VEC_BYTES)));
  typedef int64_t Int __attribute__((vector_size(KDFAST_VEC_BYTES)));
};

template <typename T>
struct Mask {
  typename VecTypes<T>::Int m;
};

template <typename T>
struct Vec {
  using Value = typename VecTypes<T>::Value;
  using Int = typename VecTypes<T>::Int;
  static constexpr int kLanes = KDFAST_VEC_BYTES / sizeof(T);
  Value v;

  Vec() = default;
  KD_INLINE Vec(Value value) : v(value) {}
  KD_INLINE Vec(T value) : v(value - Value{}) {}
  static KD_INLINE Vec load(const T* from) {
    Vec x;
    __builtin_memcpy(&x.v, from, sizeof(Value));
    return x;
  }
  KD_INLINE void store(T* to) const { __builtin_memcpy(to, &v, sizeof(Value)); }
};

// Whether its numbers are doubles.
template <typename V>
constexpr bool kIsWide = false;
template <>
inline constexpr bool kIsWide<Vec<double>> = true;

// 0, 1, 2, ...
template <typename T>
KD_INLINE Vec<T> lane_numbers() {
  Vec<T> x;
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.v[i] = T(i);
  return x;
}

template <typename T>
KD_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <typename T>
KD_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <typename T>
KD_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <typename T>
KD_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.v / b.v;
}
template <typename T>
KD_INLINE Vec<T> operator-(Vec<T> a) {
  return -a.v;
}
template <typename T>
KD_INLINE Mask<T> operator==(Vec<T> a, Vec<T> b) {
  return {a.v == b.v};
}
template <typename T>
KD_INLINE Mask<T> operator>(Vec<T> a, Vec<T> b) {
  return {a.v > b.v};
}
template <typename T>
KD_INLINE Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.m & b.m};
}
template <typename T>
KD_INLINE Vec<T> select(Mask<T> mask, Vec<T> yes, Vec<T> no) {
  return mask.m ? yes.v : no.v;
}
// Both return `b` when `a` or `b` is NaN, as one instruction does.
template <typename T>
KD_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a.v > b.v ? a.v : b.v;
}
template <typename T>
KD_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return a.v < b.v ? a.v : b.v;
}
template <typename T>
KD_INLINE Vec<T> abs(Vec<T> a) {
  return max(-a, a);
}

// x, rounded: keeps the compiler from fusing the product that made x into a later addition. Equal products then have
// equal values, and their difference is exactly 0.
template <typename T>
KD_INLINE Vec<T> rounded(Vec<T> x) {
#if defined(__x86_64__)
#if KDFAST_VEC_BYTES == 64
  __asm__("" : "+v"(x.v));
#else
  __asm__("" : "+x"(x.v));
#endif
#elif defined(__aarch64__)
  __asm__("" : "+w"(x.v));
#endif
  return x;
}

// Folds the vector's halves onto each other: lane after lane, every addition would wait for the one before.
template <typename T>
KD_INLINE T reduce_add(Vec<T> x) {
#if KDFAST_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)x.v);
#endif
  T folded[Vec<T>::kLanes];
  x.store(folded);
  for (int width = Vec<T>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) folded[i] += folded[i + width];
  return folded[0];
}
// Of vectors without NaN.
template <typename T>
KD_INLINE T reduce_max(Vec<T> x) {
#if KDFAST_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)x.v);
#endif
  T folded[Vec<T>::kLanes];
  x.store(folded);
  for (int width = Vec<T>::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) folded[i] = folded[i + width] > folded[i] ? folded[i + width] : folded[i];
  return folded[0];
}

template <typename T>
struct Real;

template <>
struct Real<float> {
  static constexpr float kInf = __builtin_inff();
  static constexpr float kTiny = 0x1p-126f, kMax = 0x1.fffffep127f;
  static constexpr int kMantissa = 23, kBias = 127;
  // Adding this rounds to an integer and leaves it in the low mantissa bits, biased as an exponent is.
  static constexpr float kRound = 0x1.8p23f + 127;
  // ln 2 in two parts, the first short enough for exact products with exponents.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // 2^f on [-1/2, 1/2], minimax.
  static constexpr float kExp2[] = {1.534581242594868e-4f,
                                    1.339993090368807e-3f,
                                    9.618489071726799e-3f,
                                    5.550328642129898e-2f,
                                    2.402264624834061e-1f,
                                    6.931471824645996e-1f,
                                    1.0f};
  static constexpr float kExp2Short[] = {1.327647245489061e-3f, 9.675541892647743e-3f, 5.550713092088699e-2f,
                                         2.402212023735046e-1f, 6.931469440460205e-1f, 1.0f};
};
template <>
struct Real<double> {
  static constexpr double kInf = __builtin_inf();
  static constexpr double kTiny = 0x1p-1022, kMax = 0x1.fffffffffffffp1023;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  // ln(2)^k / k!
  static constexpr double kExp2[] = {1.3691488853904129e-12, 2.5678435993488205e-11,
                                     4.4455382718708116e-10, 7.0549116208011233e-09,
                                     1.0178086009239699e-07, 1.3215486790144307e-06,
                                     1.5252733804059840e-05, 1.5403530393381608e-04,
                                     1.3333558146428443e-03, 9.6181291076284768e-03,
                                     5.5504108664821580e-02, 2.4022650695910072e-01,
                                     6.9314718055994531e-01, 1.0};
};

// A polynomial by Horner's rule, highest power first.
template <typename T, int kCount>
KD_INLINE Vec<T> horner(const T (&coefficients)[kCount], Vec<T> x) {
  Vec<T> y(coefficients[0]);
  for (int i = 1; i < kCount; ++i) y = y * x + Vec<T>(coefficients[i]);
  return y;
}

// 2^x: exact 0 below the normal range, +inf above it, NaN stays NaN.
template <typename T>
KD_INLINE Vec<T> exp2(Vec<T> x) {
  using R = Real<T>;
  const Vec<T> round(R::kRound);
  x = min(Vec<T>(T(R::kBias + 1)), max(Vec<T>(T(-R::kBias)), x));
  const Vec<T> r = x + round;
  const Vec<T> y = horner(R::kExp2, x - (r - round));
  // Build 2^n from its exponent field: n = -kBias gives the bits of 0, n = kBias + 1 those of +inf.
  return y * Vec<T>((typename Vec<T>::Value)((typename Vec<T>::Int)(r.v) << R::kMantissa));
}

// 2^x for any x but -inf, which may give NaN. `kShort`: a relative error of 2e-7, for results with at most 16 bits.
template <bool kShort, typename T>
KD_INLINE Vec<T> exp2_finite(Vec<T> x) {
#if KDFAST_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const Vec<T> round(Real<T>::kRound), n = (x + round) - round, f = x - n;
    Vec<T> y;
    if constexpr (kShort)
      y = horner(Real<T>::kExp2Short, f);
    else
      y = horner(Real<T>::kExp2, f);
    return Vec<T>((typename Vec<T>::Value)_mm512_scalef_ps((__m512)y.v, (__m512)n.v));
  }
#endif
  return exp2(x);
}

// e^x: x - n ln 2 in two parts, so that large arguments lose nothing; +inf above the range.
template <typename T>
KD_INLINE Vec<T> exp(Vec<T> x) {
  using R = Real<T>;
  const Vec<T> round(R::kRound), log2e(T(1.4426950408889634));
  x = min(Vec<T>(T((R::kBias + 1) * 0.6931471805599453)), max(Vec<T>(T(-R::kBias * 0.6931471805599453)), x));
  const Vec<T> r = x * log2e + round, n = r - round;
  const Vec<T> f = (x - n * Vec<T>(R::kLn2High)) - n * Vec<T>(R::kLn2Low);
  return horner(R::kExp2, f * log2e) * Vec<T>((typename Vec<T>::Value)((typename Vec<T>::Int)(r.v) << R::kMantissa));
}

// Natural logarithm of a normal positive number, +inf at +inf, NaN at NaN.
KD_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  using I = V::Int;
  const I bits = (I)x.v;
  // Split at sqrt(1/2), so that the mantissa lies in [sqrt(1/2), sqrt(2)).
  const I exponent = (bits - 0x3f3504f3) >> 23;
  const V f = V((V::Value)(bits - (exponent << 23))) - V(1.0f);
  const V e = __builtin_convertvector(exponent, V::Value);
  const float coefficients[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  V y(coefficients[0]);
  for (int i = 1; i < 9; ++i) y = y * f + V(coefficients[i]);
  const V square = f * f;
  y = y * f * square + e * V(Real<float>::kLn2Low) - V(0.5f) * square + f + e * V(Real<float>::kLn2High);
  return select(x == V(Real<float>::kInf), x, select(x == x, y, x));
}
// float64 serves gradcheck, not speed.
KD_INLINE Vec<double> log(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = ::log(x.v[i]);
  return x;
}

// log(1 + x), accurate near 0 (Kahan): the rounding of 1 + x cancels in the quotient.
template <typename T>
KD_INLINE Vec<T> log1p(Vec<T> x) {
  const Vec<T> one(T(1)), u = one + x;
  return select(u == one, x, log(u) * (x / (u - one)));
}

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
