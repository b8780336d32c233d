// Between torch's tensors and kernels: rows, the current stream, and launches as clusters.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "../vector_data.h"
#include "plan.h"
#include "row_kernel.h"

namespace kdfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An (outer, inner, columns) tensor as rows.
inline RowsView rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) < 2 || x.stride(2) == 1), "expected (outer, inner, columns) rows");
  return {static_cast<char*>(x.data_ptr()), x.size(1), x.stride(0), x.stride(1)};
}

inline void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status)); }

// The common part of an op's task. Clusters hold `rows_held` rows for each of the student's; their size is chosen where
// it is 0.
inline RowTask row_task(const Tensor& student, const Tensor& coef, const std::optional<Tensor>& label, double smoothing,
                        const std::optional<Tensor>& grad, const Tensor& loss, int rows_held, int* cluster) {
  const int64_t rows = student.size(0) * student.size(1), columns = student.size(2);
  const int64_t bytes = int64_t(student.element_size());
  if (*cluster == 0) *cluster = cluster_size(rows_held * columns * bytes);
  STD_TORCH_CHECK(*cluster > 0 && rows_held * columns * bytes <= *cluster * kLargestSliceBytes,
                  "rows of this width are for another kernel");
  RowTask task = {rows_of(student), grad ? rows_of(*grad) : RowsView(), rows, int(columns)};
  task.coef = vector_data<float>(coef, ScalarType::Float, 5 * rows);
  task.label = label ? vector_data<int64_t>(*label, ScalarType::Long, rows) : nullptr;
  task.smoothing = float(smoothing);
  task.loss = static_cast<float*>(loss.data_ptr());
  task.packs = packs_of_block(columns, bytes, *cluster);
  return task;
}

// Calls run(zero of the tensor's type, stream) with the tensor's device as the current one, unless it has no rows.
template <typename Run>
void on_device(const Tensor& x, Run run) {
  if (x.size(0) * x.size(1) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* current;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(0.0f, stream);
    case ScalarType::Half:
      return run(__half(), stream);
    case ScalarType::BFloat16:
      return run(__nv_bfloat16(), stream);
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

// One cluster of `size` blocks for each row, each block with so many bytes of shared memory beside its own.
template <typename Task>
void launch_clusters(void (*kernel)(Task), const Task& task, int64_t rows, int size, int shared_bytes,
                     cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  if (size > 8) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = {unsigned(rows * size), 1, 1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, task));
}

}  // namespace kdfast::cuda
