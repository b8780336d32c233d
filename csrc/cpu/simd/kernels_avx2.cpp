#if defined(__x86_64__)
#include "isa.h"

#define KDFAST_ISA avx2
#define KDFAST_TABLE kAvx2
#define KDFAST_VEC_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#include "row_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
