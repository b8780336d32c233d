// The entries of a sparse row, without its padding, sorted by the tile that their column lies in.

#if defined(KDFAST_CPU_ENTRY_TILES_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_ENTRY_TILES_INL_H_
#undef KDFAST_CPU_ENTRY_TILES_INL_H_
#else
#define KDFAST_CPU_ENTRY_TILES_INL_H_
#endif

#include <cstdint>

#include "row.h"
#include "softmax-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

class EntryTiles {
 public:
  // Bytes for a row of `tiles` tiles.
  static int64_t bytes(int64_t tiles) { return int64_t(sizeof(int32_t)) * (tiles * kTile + tiles + 1); }
  void place(void* memory, int64_t tiles) {
    order_ = (int32_t*)memory;
    starts_ = order_ + tiles * kTile;
  }

  // A counting sort. False where an id is out of the shared vocabulary, or there are more entries than columns.
  bool sort(const Entries& entries, int64_t columns, int64_t shared) {
    const int64_t tiles = tile_count(columns);
    int64_t kept = 0;
    for (int64_t k = 0; k <= tiles; ++k) starts_[k] = 0;
    for (int64_t i = 0; i < entries.count; ++i) {
      if (entries.is_padding(i)) continue;
      if (entries.id[i] < 0 || entries.id[i] >= shared || kept++ == columns) return false;
      ++starts_[entries.id[i] / kTile];
    }
    for (int64_t k = 0, before = 0; k <= tiles; ++k) {
      const int32_t count = starts_[k];
      starts_[k] = int32_t(before);
      before += count;
    }
    for (int64_t i = 0; i < entries.count; ++i)
      if (!entries.is_padding(i)) order_[starts_[entries.id[i] / kTile]++] = int32_t(i);
    // The loop above moved each start to the end of its tile, the next tile's start: shift them back.
    for (int64_t k = tiles; k > 0; --k) starts_[k] = starts_[k - 1];
    starts_[0] = 0;
    return true;
  }

  bool any_in(int64_t k) const { return starts_[k] < starts_[k + 1]; }
  const int32_t* begin(int64_t k) const { return order_ + starts_[k]; }
  const int32_t* end(int64_t k) const { return order_ + starts_[k + 1]; }

 private:
  int32_t *order_ = nullptr, *starts_ = nullptr;
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
