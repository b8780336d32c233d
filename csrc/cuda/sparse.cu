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

}  // namespace

// Without gradient where `grad` is empty.
Tensor sparse_rows_cluster(Tensor student, Tensor ids, Tensor weights, Tensor offsets, std::optional<Tensor> tail,
                           Tensor coef, std::optional<Tensor> label, double smoothing, bool subtract_entropy,
                           std::optional<Tensor> grad, int64_t cluster) {
  const int64_t rows = coef.size(1), entries = ids.numel();
  const Tensor loss = torch::stable::new_empty(coef, {rows}, coef.scalar_type());
  const Tensor logits = torch::stable::new_empty(coef, {entries}, coef.scalar_type());
  const SparseTask task = {row_task(student, coef, label, smoothing, grad, loss, 1, int(cluster)),
                           vector_data<int32_t>(ids, ScalarType::Int, entries),
                           vector_data<float>(weights, ScalarType::Float, entries),
                           vector_data<int64_t>(offsets, ScalarType::Long, rows + 1),
                           tail ? vector_data<float>(*tail, ScalarType::Float, rows) : nullptr,
                           static_cast<float*>(logits.data_ptr()),
                           subtract_entropy};
  on_device(student, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    launch_clusters(sparse_rows<T>, task, rows, int(cluster), task.row.packs * int(sizeof(Pack<T>)), stream);
  });
  return loss;
}

int64_t sparse_rows_resident(Tensor student, int64_t cluster) {
  int64_t blocks = 0;
  on_device(student, [&](auto zero, cudaStream_t) {
    const auto kernel = sparse_rows<decltype(zero)>;
    blocks = resident_blocks(kernel, int(cluster), slice_bytes(student, int(cluster), 1));
  });
  return blocks;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def(
      "sparse_rows_cluster(Tensor student, Tensor ids, Tensor weights, Tensor offsets, Tensor? tail, Tensor coef, "
      "Tensor? label, float smoothing, bool subtract_entropy, Tensor(a!)? grad, int cluster) -> Tensor");
  m.def("sparse_rows_resident(Tensor student, int cluster) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("sparse_rows_cluster", TORCH_BOX(&sparse_rows_cluster));
  m.impl("sparse_rows_resident", TORCH_BOX(&sparse_rows_resident));
}

}  // namespace kdfast::cuda
