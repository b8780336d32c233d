#include "half.h"

#include <torch/headeronly/util/Half.h>

namespace kdfast {

float half_to_float(uint16_t bits) { return c10::detail::fp16_ieee_to_fp32_value(bits); }

uint16_t half_from_float(float value) { return c10::detail::fp16_ieee_from_fp32_value(value); }

}  // namespace kdfast
