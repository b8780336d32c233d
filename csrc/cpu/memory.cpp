#include "memory.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdfast {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Free {
  void operator()(void* data) const { std::free(data); }
};

void* new_pages(int64_t bytes) {
  const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, rounded);
  if (!data) throw std::bad_alloc();
  advise_huge_pages(data, rounded);
  return data;
}

class BlockPool {
 public:
  void* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_ && sizes_[kept_] >= bytes && sizes_[kept_] <= 2 * bytes) return std::exchange(kept_, nullptr);
    drop();
    void* data = new_pages(bytes);
    sizes_[data] = bytes;
    return data;
  }
  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop();
    kept_ = data;
  }

 private:
  void drop() {
    sizes_.erase(kept_);
    std::free(std::exchange(kept_, nullptr));
  }

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> sizes_;  // of every block, in use or kept
  void* kept_ = nullptr;
};

// Never destroyed: tensors may outlive static objects.
BlockPool& block_pool() {
  static BlockPool& pool = *new BlockPool;
  return pool;
}

struct Workspace {
  std::unique_ptr<void, Free> data;
  int64_t bytes = 0;
};

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // A refusal costs speed alone.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void* take_block(int64_t bytes) { return block_pool().take(bytes); }

void return_block(void* data) { block_pool().give_back(data); }

void* thread_workspace(int64_t bytes) {
  thread_local Workspace workspace;
  if (workspace.bytes < bytes) {
    workspace.data.reset();
    workspace.bytes = 0;
    workspace.data.reset(new_pages(bytes));
    workspace.bytes = bytes;
  }
  return workspace.data.get();
}

}  // namespace kdfast
