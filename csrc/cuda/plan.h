// Which rows the one-read kernels take, and how many thread blocks share one.
#pragma once

#include <cstdint>

namespace kdfast::cuda {

constexpr int kThreads = 256;
constexpr int kMaxCluster = 16;  // of the sizes that a kernel may opt into on sm_90
// A block's rows in shared memory. Three blocks of 72 KiB fit on a multiprocessor: one loads while others compute and
// store. Above 16 blocks of that, two must do; beyond, the rows are read twice.
constexpr int64_t kSliceBytes = 72 << 10, kLargestSliceBytes = 112 << 10;
// Rows of fewer bytes than this leave most of a block's threads idle.
constexpr int64_t kNarrowestRow = 8 << 10;

// How many blocks share a row of `row_bytes` (all rows that lie on the chip together); 0: it is not for these kernels.
constexpr int cluster_size(int64_t row_bytes) {
  if (row_bytes < kNarrowestRow) return 0;
  for (int size = 1; size <= kMaxCluster; size *= 2)
    if (row_bytes <= size * kSliceBytes) return size;
  return row_bytes <= kMaxCluster * kLargestSliceBytes ? kMaxCluster : 0;
}

// The 16-byte packs that each block of a cluster takes: of one more than the row has, for one that begins within a
// pack.
constexpr int packs_of_block(int64_t columns, int64_t element_size, int cluster) {
  const int64_t lanes = 16 / element_size, packs = (columns + lanes - 1) / lanes + 1;
  return int((packs + cluster - 1) / cluster);
}

}  // namespace kdfast::cuda
