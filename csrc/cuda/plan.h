// Which rows the one-read kernels take, and how many thread blocks share one.
#pragma once

#include <cstdint>

namespace kdfast::cuda {

constexpr int kThreads = 256;
constexpr int kMaxCluster = 16;  // the largest that sm_90 allows, by opting in
// Bytes of a block's rows in shared memory. Three blocks of 72 KiB fit on a multiprocessor: one loads while the others
// compute and store. Rows that 16 such blocks cannot hold get up to 112 KiB a block, of which two fit; longer ones are
// left to the kernels that read a row twice.
constexpr int64_t kSliceBytes = 72 << 10, kLargestSliceBytes = 112 << 10;
// Rows of fewer bytes than this leave most of a block's threads idle.
constexpr int64_t kNarrowestRow = 8 << 10;

// How many blocks share a row, whose `row_bytes` count every row held for it; 0: these kernels do not take it.
constexpr int cluster_size(int64_t row_bytes) {
  if (row_bytes < kNarrowestRow) return 0;
  for (int size = 1; size <= kMaxCluster; size *= 2)
    if (row_bytes <= size * kSliceBytes) return size;
  return row_bytes <= kMaxCluster * kLargestSliceBytes ? kMaxCluster : 0;
}

// How many 16-byte packs each block of a cluster takes. One more than the row fills, as it may begin within a pack.
constexpr int packs_of_block(int64_t columns, int64_t element_size, int cluster) {
  const int64_t lanes = 16 / element_size, packs = (columns + lanes - 1) / lanes + 1;
  return int((packs + cluster - 1) / cluster);
}

}  // namespace kdfast::cuda
