#include "memory.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdfast {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Free {
  void operator()(void* data) const { std::free(data); }
};

struct Workspace {
  std::unique_ptr<void, Free> data;
  int64_t bytes = 0;
};

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // Advice: a refusal changes speed, not results.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void* thread_workspace(int64_t bytes) {
  thread_local Workspace workspace;
  if (workspace.bytes < bytes) {
    const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    workspace.data.reset();
    workspace.data.reset(std::aligned_alloc(kHugePage, rounded));
    workspace.bytes = workspace.data ? rounded : 0;
    if (!workspace.data) throw std::bad_alloc();
    advise_huge_pages(workspace.data.get(), rounded);
  }
  return workspace.data.get();
}

}  // namespace kdfast
