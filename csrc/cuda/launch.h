// From torch's tensors to kernels: rows, the current stream, and launches of clusters.
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

#include "../row_arguments.h"
#include "../vector_data.h"
#include "plan.h"
#include "row_kernel.h"

namespace kdfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An (outer, inner, columns) tensor as rows.
inline StridedRows rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) < 2 || x.stride(2) == 1), "expected (outer, inner, columns) rows");
  return {static_cast<char*>(x.data_ptr()), x.size(1), x.stride(0), x.stride(1)};
}

// Rows that go with `count` others.
inline StridedRows rows_of(const Tensor& x, int64_t count, int64_t columns) {
  const StridedRows rows = rows_of(x);
  STD_TORCH_CHECK(x.size(0) * x.size(1) == count && x.size(2) >= columns,
                  "teacher and grad must have the student's rows and columns");
  return rows;
}

inline void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status)); }

// Bytes of shared memory that a block needs for its part of `rows_held` rows.
inline int slice_bytes(const Tensor& student, int cluster, int rows_held) {
  return rows_held * packs_of_block(student.size(2), int64_t(student.element_size()), cluster) * int(sizeof(uint4));
}

// The part of a task that all ops share. A cluster holds `rows_held` rows: the student's, and a dense teacher's.
template <typename Arguments>
RowTask row_task(const Arguments& arguments, const Tensor& loss, int rows_held) {
  const Tensor& student = arguments.student;
  STD_TORCH_CHECK(student.dim() == 3, "student must be (outer, inner, columns)");
  const int64_t rows = student.size(0) * student.size(1), columns = student.size(2);
  const int64_t element_size = int64_t(student.element_size());
  const int cluster = int(arguments.cluster);
  STD_TORCH_CHECK(cluster > 0 && cluster <= kMaxCluster &&
                      slice_bytes(student, cluster, rows_held) <= kLargestSliceBytes + rows_held * int(sizeof(uint4)),
                  "a cluster of this many blocks does not hold rows of this width");
  RowTask task = {rows_of(student), StridedRows(), rows, int(columns)};
  if (arguments.grad) task.grad = rows_of(*arguments.grad, rows, columns);
  task.coef = vector_data<float>(arguments.coef, ScalarType::Float, 5 * rows);
  task.label = arguments.label ? vector_data<int64_t>(*arguments.label, ScalarType::Long, rows) : nullptr;
  task.smoothing = float(arguments.smoothing);
  task.loss = static_cast<float*>(loss.data_ptr());
  task.packs = packs_of_block(columns, element_size, cluster);
  return task;
}

// Calls run(a zero of the tensor's type, stream) on the tensor's device, unless the tensor has no rows.
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

// A launch of one cluster of `size` blocks per row, each block with `shared_bytes` of dynamic shared memory.
class Launch {
 public:
  template <typename Task>
  Launch(void (*kernel)(Task), int64_t rows, int size, int shared_bytes, cudaStream_t stream) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    if (size > 8) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {unsigned(size), 1, 1};
    config.gridDim = {unsigned(rows * size), 1, 1};
    config.blockDim = {kThreads, 1, 1};
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute_;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;

  cudaLaunchConfig_t config = {};

 private:
  cudaLaunchAttribute attribute_;
};

template <typename Task>
void launch_clusters(void (*kernel)(Task), const Task& task, int64_t rows, int size, int shared_bytes,
                     cudaStream_t stream) {
  const Launch launch(kernel, rows, size, shared_bytes, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, task));
}

// How many blocks, in clusters of `size`, the device runs at a time; 0: such a cluster does not fit.
template <typename Task>
int64_t resident_blocks(void (*kernel)(Task), int size, int shared_bytes) {
  const Launch launch(kernel, 1, size, shared_bytes, nullptr);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
  return int64_t(clusters) * size;
}

}  // namespace kdfast::cuda
