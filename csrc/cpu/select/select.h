// What the ops that select columns share.
#pragma once

#include "../rows.h"

namespace kdfast {

inline void check_selection(int64_t columns, double temperature) {
  STD_TORCH_CHECK(columns >= 1 && columns <= INT32_MAX, "expected a vocabulary that 32-bit ids can name");
  STD_TORCH_CHECK(temperature > 0, "expected a positive temperature");
}

inline int64_t chunk_count(int64_t columns) { return (columns + kSelectChunk - 1) / kSelectChunk; }

}  // namespace kdfast
