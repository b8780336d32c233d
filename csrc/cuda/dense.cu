// The one-read dense kernel: a thread-block cluster per row, both rows in its shared memory. sm_90 and up.
#include "dense_kernel.h"
#include "launch.h"

namespace kdfast::cuda {
namespace {

template <Kind kKind, typename T>
__global__ void __launch_bounds__(kThreads, 3) dense_rows(const __grid_constant__ DenseTask task) {
#ifdef KDFAST_HAS_CLUSTERS
  dense_row<kKind, T>(task);
#endif
}

template <Kind kKind, typename T>
void launch(const DenseTask& task, int cluster, cudaStream_t stream) {
  const int shared_bytes = 2 * task.row.packs * int(sizeof(Pack<T>));
  launch_clusters(dense_rows<kKind, T>, task, task.row.rows, cluster, shared_bytes, stream);
}

template <typename T>
void launch(const DenseTask& task, int cluster, cudaStream_t stream) {
  with_kind(task.divergence.kind, [&](auto kind) {
    if constexpr (family_of(kind.value) != Family::kSpecial) {
      launch<kind.value, T>(task, cluster, stream);
    } else {
      STD_TORCH_CHECK(false, "the one-read kernel has no such divergence");
    }
  });
}

Tensor dense_rows_cluster(const DenseClusterArguments& arguments) {
  const Tensor &student = arguments.student, &teacher = arguments.teacher, &coef = arguments.coef;
  STD_TORCH_CHECK(teacher.scalar_type() == student.scalar_type(), "student and teacher must have one dtype");
  const int64_t rows = coef.size(1);
  const Tensor loss = torch::stable::new_empty(coef, {rows}, coef.scalar_type());
  // A teacher of fewer columns is for another kernel.
  const RowTask row = row_task(arguments, loss, 2);
  const DenseTask task = {row, rows_of(teacher, rows, student.size(2)), divergence_of(arguments)};
  on_device(student,
            [&](auto zero, cudaStream_t stream) { launch<decltype(zero)>(task, int(arguments.cluster), stream); });
  return loss;
}

}  // namespace

int64_t dense_rows_resident(Tensor student, int64_t cluster) {
  int64_t blocks = 0;
  on_device(student, [&](auto zero, cudaStream_t) {
    const auto kernel = dense_rows<Kind::kForwardKl, decltype(zero)>;
    blocks = resident_blocks(kernel, int(cluster), slice_bytes(student, int(cluster), 2));
  });
  return blocks;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def("dense_rows_cluster(Tensor student" KDFAST_SCHEMA(KDFAST_DENSE_ROWS_CLUSTER) ") -> Tensor");
  m.def("dense_rows_resident(Tensor student, int cluster) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("dense_rows_cluster", TORCH_BOX(&Op<dense_rows_cluster>::call));
  m.impl("dense_rows_resident", TORCH_BOX(&dense_rows_resident));
}

}  // namespace kdfast::cuda
