// Rows of top-k entries, against a check that is slow and obvious.
#include <cmath>
#include <set>
#include <vector>

#include "input.h"
#include "top_rows.h"

namespace {

bool good(const int32_t* ids, const float* values, int64_t k, int32_t vocab) {
  std::set<int32_t> seen;
  for (int64_t i = 0; i < k; ++i) {
    if (std::isnan(values[i]) || values[i] > 0 || (i && values[i] > values[i - 1])) return false;
    if (std::isinf(values[i]) ? ids[i] != 0 : ids[i] < 0 || ids[i] >= vocab || !seen.insert(ids[i]).second)
      return false;
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  const int64_t k = 1 + in.take() % 48, rows = 1 + in.take() % 4;
  const int32_t vocab = 1 + int32_t(in.take(2));
  std::vector<int32_t> ids;
  std::vector<float> values;
  float before = 0;
  for (int64_t i = 0; i < rows * k; ++i) {
    const uint32_t kind = in.take();
    ids.push_back(kind & 64 ? int32_t(in.take(4)) : int32_t(i * 7 + (kind & 3)) % vocab);
    before = i % k == 0 ? 0 : before;
    if (kind & 32) {
      const uint32_t bits = in.take(4);
      std::memcpy(&before, &bits, 4);
    } else {
      before -= float(kind & 7) / 4;
    }
    values.push_back(before);
  }
  int64_t expected = -1;
  for (int64_t row = rows; row-- > 0;)
    if (!good(&ids[size_t(row * k)], &values[size_t(row * k)], k, vocab)) expected = row;
  require(kdfast::codec::first_bad_top(ids.data(), values.data(), rows, k, vocab) == expected);
  return 0;
}
