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
  launch_clusters(dense_rows<kKind, T>, task, task.rows, cluster, 2 * task.packs * int(sizeof(Pack<T>)), stream);
}

template <typename T>
void launch(const DenseTask& task, int cluster, cudaStream_t stream) {
  switch (task.divergence.kind) {
    case Kind::kForwardKl:
      return launch<Kind::kForwardKl, T>(task, cluster, stream);
    case Kind::kSoftCe:
      return launch<Kind::kSoftCe, T>(task, cluster, stream);
    case Kind::kReverseKl:
      return launch<Kind::kReverseKl, T>(task, cluster, stream);
    case Kind::kSymmetricKl:
      return launch<Kind::kSymmetricKl, T>(task, cluster, stream);
    case Kind::kJsd:
      return launch<Kind::kJsd, T>(task, cluster, stream);
    case Kind::kSkewForwardKl:
      return launch<Kind::kSkewForwardKl, T>(task, cluster, stream);
    case Kind::kSkewReverseKl:
      return launch<Kind::kSkewReverseKl, T>(task, cluster, stream);
    case Kind::kTvd:
      return launch<Kind::kTvd, T>(task, cluster, stream);
    case Kind::kAlphaBeta:
      return launch<Kind::kAlphaBeta, T>(task, cluster, stream);
    default:
      STD_TORCH_CHECK(false, "the one-read kernel has no such divergence");
  }
}

}  // namespace

// Without gradient where `grad` is empty. The rows' bytes must suit cluster_size().
Tensor dense_rows_cluster(Tensor student, Tensor teacher, Tensor coef, std::optional<Tensor> label, double smoothing,
                          int64_t kind, double a, double b, double scale, std::optional<Tensor> grad) {
  const int64_t rows = student.size(0) * student.size(1), columns = student.size(2);
  const int64_t bytes = int64_t(student.element_size());
  const int cluster = cluster_size(2 * columns * bytes);
  STD_TORCH_CHECK(cluster > 0 && teacher.size(2) >= columns, "rows of another width are for another kernel");
  STD_TORCH_CHECK(teacher.scalar_type() == student.scalar_type(), "student and teacher must have one dtype");
  const Tensor loss = torch::stable::new_empty(coef, {rows}, coef.scalar_type());
  DenseTask task = {rows_of(student), rows_of(teacher), grad ? rows_of(*grad) : RowsView(), rows, int(columns)};
  task.coef = vector_data<float>(coef, ScalarType::Float, 5 * rows);
  task.label = label ? vector_data<int64_t>(*label, ScalarType::Long, rows) : nullptr;
  task.smoothing = float(smoothing);
  task.divergence = {static_cast<Kind>(kind), a, b, scale, false};
  task.loss = static_cast<float*>(loss.data_ptr());
  // One pack more than the row has, for one that begins within a pack.
  const int64_t lanes = int64_t(sizeof(uint4)) / bytes, packs = (columns + lanes - 1) / lanes + 1;
  task.packs = int((packs + cluster - 1) / cluster);
  if (!rows) return loss;
  const OnDevice device(student);
  switch (student.scalar_type()) {
    case ScalarType::Float:
      launch<float>(task, cluster, device.stream);
      break;
    case ScalarType::Half:
      launch<__half>(task, cluster, device.stream);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(task, cluster, device.stream);
      break;
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
  return loss;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kdfast, m) {
  m.def(
      "dense_rows_cluster(Tensor student, Tensor teacher, Tensor coef, Tensor? label, float smoothing, int kind, "
      "float a, float b, float scale, Tensor(a!)? grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { m.impl("dense_rows_cluster", TORCH_BOX(&dense_rows_cluster)); }

}  // namespace kdfast::cuda
