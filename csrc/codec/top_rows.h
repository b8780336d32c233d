// Rows of codecs with a fixed layout: what it says, checked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast::codec {

// The first of `rows` that is none of a top-k codec's, or -1. A row has k ids and k log-probabilities: these are at
// most 0 and do not ascend, -inf marks what is no entry, whose id is 0, and the ids of entries are below `vocab` and
// distinct.
int64_t first_bad_top(const int32_t* ids, const float* values, int64_t rows, int64_t k, int32_t vocab);

struct CheckedCodes {
  int64_t first_bad;  // row that has no code 0, or is spread out and has none that is `last`; or -1
  bool has_masked;    // whether a row up to there has a code above `last`
};

// Looks at rows of codes, `stride` bytes apart.
CheckedCodes check_codes(const uint8_t* codes, ptrdiff_t stride, int64_t rows, int64_t columns, uint8_t last,
                         const bool* spread);

}  // namespace kdfast::codec
