// The one-read sparse kernel: a thread-block cluster per row, the student's row in its shared memory. sm_90 and up.
#include "launch.h"
#include "sparse_kernel.h"

namespace kdfast::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) sparse_rows(const __grid_constant__ SparseTask task) {
#ifdef KDFAST_HAS_CLUSTERS
  sparse_row<T>(task);
#endif
}

Tensor sparse_rows_cluster(const SparseClusterArguments& arguments) {
  const Tensor &student = arguments.student, &coef = arguments.coef;
  const int64_t rows = coef.size(1), entries = arguments.ids.numel();
  const Tensor loss = torch::stable::new_empty(coef, {rows}, coef.scalar_type());
  const Tensor logits = torch::stable::new_empty(coef, {entries}, coef.scalar_type());
  const EntryLists lists = {vector_data<int32_t>(arguments.ids, ScalarType::Int, entries),
                            vector_data<float>(arguments.weights, ScalarType::Float, entries),
                            vector_data<int64_t>(arguments.offsets, ScalarType::Long, rows + 1),
                            arguments.tail ? vector_data<float>(*arguments.tail, ScalarType::Float, rows) : nullptr,
                            static_cast<float*>(logits.data_ptr()),
                            entries};
  const SparseTask task = {row_task(arguments, loss, 1), lists, arguments.subtract_entropy};
  on_device(student, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    const int shared_bytes = task.row.packs * int(sizeof(Pack<T>));
    launch_clusters(sparse_rows<T>, task, rows, int(arguments.cluster), shared_bytes, stream);
  });
  return loss;
}

}  // namespace

int64_t sparse_rows_resident(Tensor student, int64_t cluster) {
  int64_t blocks = 0;
  on_device(student, [&](auto zero, cudaStream_t) {
    const auto kernel = sparse_rows<decltype(zero)>;
    blocks = resident_blocks(kernel, int(cluster), slice_bytes(student, int(cluster), 1));
  });
  return blocks;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def("sparse_rows_cluster(Tensor student" KDFAST_SCHEMA(KDFAST_SPARSE_ROWS_CLUSTER) ") -> Tensor");
  m.def("sparse_rows_resident(Tensor student, int cluster) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("sparse_rows_cluster", TORCH_BOX(&Op<sparse_rows_cluster>::call));
  m.impl("sparse_rows_resident", TORCH_BOX(&sparse_rows_resident));
}

}  // namespace kdfast::cuda
