// float16 conversions for processors that have no instructions for them. Their file is compiled for no particular ISA.
#pragma once

#include <cstdint>

namespace kdfast {

float half_to_float(uint16_t bits);
uint16_t half_from_float(float value);

}  // namespace kdfast
