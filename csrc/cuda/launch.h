// Between torch's tensors and kernels: rows, the current stream, and launches as clusters.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "plan.h"
#include "rows_view.h"

namespace kdfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An (outer, inner, columns) tensor as rows.
inline RowsView rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) < 2 || x.stride(2) == 1), "expected (outer, inner, columns) rows");
  return {static_cast<char*>(x.data_ptr()), x.size(1), x.stride(0), x.stride(1)};
}

// The data of a contiguous vector of `count` elements, which the kernels index as they like.
template <typename T>
const T* vector_data(const Tensor& x, ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == count,
                  "expected a contiguous vector of the rows' size and the schema's dtype");
  return static_cast<const T*>(x.data_ptr());
}

inline void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status)); }

// Makes a tensor's device the current one, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

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
