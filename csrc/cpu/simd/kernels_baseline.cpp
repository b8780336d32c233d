#include "isa.h"

#define KDFAST_ISA baseline
#define KDFAST_TABLE kBaseline
#define KDFAST_VEC_BYTES 16

#include "row_kernels.h"
