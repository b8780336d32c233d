// sm_90's thread-block clusters: bulk copies into shared memory, and reductions across the blocks of a cluster.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "plan.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KDFAST_HAS_CLUSTERS

namespace kdfast::cuda {

namespace cg = cooperative_groups;

// An mbarrier for one use: completes when the expected number of bytes has arrived.
struct Arrivals {
  uint64_t state;

  __device__ uint32_t address() const { return uint32_t(__cvta_generic_to_shared(&state)); }

  __device__ void init(uint32_t threads) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(threads) : "memory");
    // Makes the initialised barrier visible to the copy engine.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ void expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }

  __device__ void wait() const {
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{ .reg .pred complete;"
          "  mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], 0;"
          "  selp.b32 %0, 1, 0, complete; }"
          : "=r"(done)
          : "r"(address())
          : "memory");
    }
  }
};

// Starts an asynchronous copy. Size and addresses are multiples of 16 bytes.
__device__ inline void copy_bulk(void* shared, const void* global, uint32_t bytes, const Arrivals& arrivals) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes), "r"(arrivals.address())
               : "memory");
}

// Shared memory for a reduction: a slot for each warp of this block, and one for each block of the cluster.
template <typename T>
struct Exchange {
  T of_warp[kThreads / 32];
  T of_block[kMaxCluster];
};

template <typename T, typename Merge>
__device__ T reduce_warp(T value, int lanes, Merge merge) {
  constexpr int kWords = sizeof(T) / 4;
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    T other;
    for (int i = 0; i < kWords; ++i)
      reinterpret_cast<float*>(&other)[i] =
          __shfl_xor_sync(0xffffffff, reinterpret_cast<const float*>(&value)[i], distance);
    value = merge(value, other);
  }
  return value;
}

// Merges the values of all threads of the cluster; every thread gets the same result.
template <typename T, typename Merge>
__device__ T reduce_cluster(T value, Exchange<T>& exchange, T none, Merge merge) {
  cg::cluster_group cluster = cg::this_cluster();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = int(cluster.num_blocks());
  value = reduce_warp(value, 32, merge);
  if (lane == 0) exchange.of_warp[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = reduce_warp(exchange.of_warp[lane % (kThreads / 32)], kThreads / 32, merge);
    if (lane < blocks) cluster.map_shared_rank(exchange.of_block, lane)[cluster.block_rank()] = value;
  }
  cluster.sync();
  return reduce_warp(lane % kMaxCluster < blocks ? exchange.of_block[lane % kMaxCluster] : none, kMaxCluster, merge);
}

}  // namespace kdfast::cuda

#endif
