// One ISA's kernels. The including file sets KDFAST_ISA (its namespace), KDFAST_TABLE (its entry in row.h),
// KDFAST_VEC_BYTES and the target pragma, after isa.h.

namespace kdfast {
namespace KDFAST_ISA {

// In the order that they need each other.
// clang-format off
#include "vec.h"
#include "../rowmath.h"
#include "load.h"
#include "softmax.h"
#include "entry_tiles.h"
#include "row_sweep.h"
#include "background.h"
#include "dense_row.h"
#include "sparse_row.h"
#include "chunked_row.h"
#include "select_row.h"
#include "top_row.h"
// clang-format on

template <typename T>
RowResult dense_row(const Divergence& divergence, const RowTask& task, void* workspace) {
  return DenseRow<T>(divergence, task, workspace).run();
}

template <typename T>
RowResult sparse_row(const RowTask& task, void* workspace) {
  return SparseRow<T>(task, workspace).run();
}

template <typename From>
struct WorkingType {
  using Type = float;
};
template <>
struct WorkingType<double> {
  using Type = double;
};

template <typename From>
Selection select_typed(const From*, const SelectTask& task, void* workspace) {
  using T = typename WorkingType<From>::Type;
  return task.likeliest ? TopRow<T, From>(task, workspace).run() : SelectRow<T, From>(task, workspace).run();
}

Selection select_row(const SelectTask& task, void* workspace) {
  Selection selection;
  with_type(task.logits.data, task.logits.dtype, [&](auto* data) { selection = select_typed(data, task, workspace); });
  return selection;
}

template <typename T>
void scale_tiles(void* data, Dtype dtype, int64_t size, double factor) {
  T tile[kTile];
  for (int64_t begin = 0; begin < size; begin += kTile) {
    const int count = int(size - begin < kTile ? size - begin : kTile);
    load({data, dtype, size}, begin, count, tile);
    for (int i = 0; i < count; ++i) tile[i] *= T(factor);
    store(tile, count, data, dtype, begin);
  }
}

// What RowSweep::carve() lays out, for the wider working type.
int64_t workspace_bytes(int64_t columns) {
  const int64_t tiles = tile_count(columns);
  return int64_t(sizeof(double)) * (3 * tiles * kTile + 4 * kTile + 10 * tiles) + EntryTiles::bytes(tiles) + tiles + 64;
}

void fence() {
#if KDFAST_VEC_BYTES >= 32
  _mm_sfence();
#endif
}

void scale(void* data, Dtype dtype, int64_t size, double factor) {
  if (dtype == Dtype::kDouble) return scale_tiles<double>(data, dtype, size, factor);
  scale_tiles<float>(data, dtype, size, factor);
}

}  // namespace KDFAST_ISA

#define KDFAST_NAME_OF(isa) #isa
#define KDFAST_NAME(isa) KDFAST_NAME_OF(isa)
extern const Kernels KDFAST_TABLE = {
    KDFAST_NAME(KDFAST_ISA),
    KDFAST_ISA::dense_row<float>,
    KDFAST_ISA::dense_row<double>,
    KDFAST_ISA::sparse_row<float>,
    KDFAST_ISA::sparse_row<double>,
    KDFAST_ISA::select_row,
    KDFAST_ISA::shape_entropy<float>,
    KDFAST_ISA::shape_entropy<double>,
    KDFAST_ISA::scale,
    KDFAST_ISA::workspace_bytes,
    KDFAST_ISA::fence,
};

}  // namespace kdfast
