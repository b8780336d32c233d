// The data pointers of vectors that kernels index, on any device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace kdfast {

// The data of a contiguous vector of `count` elements.
template <typename T>
const T* vector_data(const torch::stable::Tensor& x, torch::headeronly::ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == count,
                  "expected a contiguous vector of the rows' or entries' size and the schema's dtype");
  return static_cast<const T*>(x.data_ptr());
}

}  // namespace kdfast
