// The functions that rowmath.h and the row kernels need, for one float. Host and device.
#pragma once

#include <cmath>

// What rowmath.h is compiled for: vectors of one float.
#define KDFAST_TARGET cuda
#define KDFAST_VEC_BYTES 4
#include "../target.h"

namespace kdfast::cuda {

constexpr float kInf = __builtin_huge_valf(), kLowest = -3.402823466e+38f;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Whether numbers are doubles.
template <typename V>
constexpr bool kIsWide = false;

// 2^x; exactly 0 below float's range.
KD_INLINE float exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

// A product that is rounded before it is added to anything: keeps the compiler from fusing it.
KD_INLINE float product(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

KD_INLINE float select(bool condition, float x, float y) { return condition ? x : y; }
KD_INLINE float min(float x, float y) { return ::fminf(x, y); }
KD_INLINE float abs(float x) { return ::fabsf(x); }
KD_INLINE float exp(float x) { return exp2(x * kLog2e); }
KD_INLINE float log1p(float x) { return ::log1pf(x); }

}  // namespace kdfast::cuda
