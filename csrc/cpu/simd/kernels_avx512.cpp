#if defined(__x86_64__)

#define KDFAST_TARGET avx512
#define KDFAST_TARGET_OPTIONS "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"
#define KDFAST_VEC_BYTES 64

#include "kernels-inl.h"

#endif
