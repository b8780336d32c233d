#if defined(__x86_64__)
#include "isa.h"

#define KDFAST_ISA avx512
#define KDFAST_TABLE kAvx512
#define KDFAST_VEC_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif

#include "row_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
