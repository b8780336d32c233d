// x *= factor, and nothing at all when the factor is 1, as it is in most backward passes.
#include "rows.h"

namespace kdfast {

void scale_(Tensor x, Tensor factor) {
  STD_TORCH_CHECK(x.is_contiguous(), "expected a contiguous x");
  const double by = Numbers(factor, 1)[0];
  if (by == 1) return;
  const int64_t bytes = int64_t(x.element_size());
  char* data = static_cast<char*>(x.data_ptr());
  torch::stable::parallel_for(0, x.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    kernels().scale(data + begin * bytes, dtype_of(x), end - begin, by);
  });
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("scale_", TORCH_BOX(&scale_)); }

}  // namespace kdfast
