#include "top_rows.h"

#include <cstddef>
#include <limits>
#include <vector>

namespace kdfast::codec {

namespace {

constexpr int64_t kFew = 32;  // entries of which every two are compared: that has no branch

bool distinct(const int32_t* ids, int64_t count) {
  int32_t same = 0;
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = 0; j < i; ++j) same |= ids[i] == ids[j];
  return !same;
}

// The same with a bit per id, which are all below the bits that there are. The bits are 0 before and after.
bool distinct(const int32_t* ids, int64_t count, std::vector<bool>& seen) {
  int64_t i = 0;
  for (; i < count && !seen[size_t(ids[i])]; ++i) seen[size_t(ids[i])] = true;
  for (int64_t j = 0; j < i; ++j) seen[size_t(ids[j])] = false;
  return i == count;
}

}  // namespace

int64_t first_bad_top(const int32_t* ids, const float* values, int64_t rows, int64_t k, int32_t vocab) {
  std::vector<bool> seen(k > kFew ? size_t(vocab) : 0);
  for (int64_t row = 0; row < rows; ++row, ids += k, values += k) {
    float before = 0;
    int64_t count = 0;
    bool good = true;
    for (int64_t i = 0; i < k; ++i) {
      const bool entry = values[i] > -std::numeric_limits<float>::infinity();
      good &= values[i] <= before;  // not for NaN
      good &= uint32_t(ids[i]) < uint32_t(entry ? vocab : 1);
      before = values[i];
      count += entry;
    }
    // In order, so that the entries are the first ones.
    if (!good || !(k > kFew ? distinct(ids, count, seen) : distinct(ids, count))) return row;
  }
  return -1;
}

}  // namespace kdfast::codec
