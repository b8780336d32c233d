// Buffers whose first touch costs one page fault per 2 MiB instead of one per 4 KiB, where the system allows it.
// A fresh gradient's page faults otherwise cost as much as its arithmetic.
#pragma once

#include <cstdint>

namespace kdfast {

void advise_huge_pages(void* data, int64_t bytes);

// Memory for a gradient. Freed, it is kept for the next one that fits in it: a training loop frees one gradient a step
// and asks for another, and fresh pages cost more than the arithmetic that fills them. At most one block is kept, and
// none while a larger one is being made.
void* take_block(int64_t bytes);
void return_block(void* data);

// At least `bytes` bytes, aligned to a cache line, kept by the calling thread and reused by its next call.
void* thread_workspace(int64_t bytes);

}  // namespace kdfast
