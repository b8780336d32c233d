// What the threads of a thread-block cluster need of sm_90: bulk copies to shared memory, and each other's memory.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace kdfast::cuda {

namespace cg = cooperative_groups;

// Completes when as many bytes as it was told to expect have arrived. Used once.
struct Arrivals {
  uint64_t state;

  __device__ uint32_t address() const { return uint32_t(__cvta_generic_to_shared(&state)); }

  __device__ void init(uint32_t threads) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(threads) : "memory");
    // The copy engine must see it initialised.
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

// Starts a copy of whole 16-byte pieces between addresses divisible by 16.
__device__ inline void copy_bulk(void* shared, const void* global, uint32_t bytes, const Arrivals& arrivals) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes), "r"(arrivals.address())
               : "memory");
}

}  // namespace kdfast::cuda
