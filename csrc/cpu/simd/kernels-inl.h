// One target's kernels, as its file kernels_TARGET.cpp compiles them.

#if defined(KDFAST_CPU_SIMD_KERNELS_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SIMD_KERNELS_INL_H_
#undef KDFAST_CPU_SIMD_KERNELS_INL_H_
#else
#define KDFAST_CPU_SIMD_KERNELS_INL_H_
#endif

#include "../dense_row-inl.h"
#include "../row.h"
#include "../select/select_row-inl.h"
#include "../select/top_row-inl.h"
#include "../sparse_row-inl.h"
#include "load-inl.h"
#include "vec-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

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

// The size of what RowSweep::carve() lays out, for the wider working type.
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

#define KDFAST_NAME_OF(target) #target
#define KDFAST_NAME(target) KDFAST_NAME_OF(target)
extern const Kernels kKernels = {
    KDFAST_NAME(KDFAST_TARGET),
    dense_row<float>,
    dense_row<double>,
    sparse_row<float>,
    sparse_row<double>,
    select_row,
    prototype_entropy<float>,
    prototype_entropy<double>,
    scale,
    workspace_bytes,
    fence,
};
#undef KDFAST_NAME
#undef KDFAST_NAME_OF

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
