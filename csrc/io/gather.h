// Many small reads all over large mapped files, which the cache's reader needs for every batch.
#pragma once

#include <cstdint>

namespace kdfast {

struct Mapped {
  const unsigned char* data;
  int64_t size;
};

// Copies `count` byte ranges to `out`, one after another: range i is `ranges[2 * i + 1]` bytes from byte
// `ranges[2 * i]` of `sources[owners[i]]`. Returns `count`, or the number of the first range that does not lie in its
// source or does not fit into the `out_size` bytes of `out`.
int64_t copy_ranges(const Mapped* sources, int64_t source_count, const int64_t* owners, const int64_t* ranges,
                    int64_t count, unsigned char* out, int64_t out_size);

// For each value, the number of the last row of a table whose entry is at most that value; -1 if the first one is
// larger. `table` points to the first row's entry, the next row's is `stride` bytes on (they need not be aligned), and
// entries never decrease.
void last_at_most(const unsigned char* table, int64_t rows, int64_t stride, const int64_t* values, int64_t count,
                  int64_t* out);

}  // namespace kdfast
