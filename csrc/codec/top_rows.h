// Rows of top-k entries: what a codec's fixed layout says, checked.
#pragma once

#include <cstdint>

namespace kdfast::codec {

// The first of `rows` that is none of a top-k codec's, or -1. A row has k ids and k log-probabilities: these are at
// most 0 and do not ascend, -inf marks what is no entry, whose id is 0, and the ids of entries are below `vocab` and
// distinct.
int64_t first_bad_top(const int32_t* ids, const float* values, int64_t rows, int64_t k, int32_t vocab);

}  // namespace kdfast::codec
