// Everything an ISA's file needs before its target pragma: after it, only the project's own templates may be defined.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "half.h"
#include "row.h"
