// Buffers whose first touch costs one page fault per 2 MiB instead of one per 4 KiB, where the system allows it.
// A fresh gradient's page faults otherwise cost as much as its arithmetic.
#pragma once

#include <cstdint>

namespace kdfast {

void advise_huge_pages(void* data, int64_t bytes);

// At least `bytes` bytes, aligned to a cache line, kept by the calling thread and reused by its next call.
void* thread_workspace(int64_t bytes);

}  // namespace kdfast
