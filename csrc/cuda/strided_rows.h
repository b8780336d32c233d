// Rows of unit stride in a tensor of (outer, inner, columns).
#pragma once

#include <cstdint>

namespace kdfast::cuda {

struct StridedRows {
  char* data = nullptr;
  int64_t inner = 1, stride_outer = 0, stride_inner = 0;  // in elements

  template <typename T>
  __device__ T* row(int64_t i) const {
    return reinterpret_cast<T*>(data) + (i / inner * stride_outer + i % inner * stride_inner);
  }
};

}  // namespace kdfast::cuda
