#define KDFAST_TARGET baseline
#define KDFAST_VEC_BYTES 16

#include "kernels-inl.h"
