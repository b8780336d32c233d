// float16 for the processors without instructions for it, in a file of its own so that no ISA's flags reach it.
#pragma once

#include <cstdint>

namespace kdfast {

float half_to_float(uint16_t bits);
uint16_t half_from_float(float value);

}  // namespace kdfast
