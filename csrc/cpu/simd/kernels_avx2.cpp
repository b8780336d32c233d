#if defined(__x86_64__)

#define KDFAST_TARGET avx2
#define KDFAST_TARGET_OPTIONS "avx2,fma,f16c,bmi,bmi2"
#define KDFAST_VEC_BYTES 32

#include "kernels-inl.h"

#endif
