#include "top_rows.h"

#include <cstddef>
#include <limits>
#include <vector>

namespace kdfast::codec {

namespace {

// Whether ids are distinct. Of most rows one of two small tables tells: no two of their ids share a place in it.
class Distinct {
 public:
  explicit Distinct(int32_t vocab) : vocab_(size_t(vocab)) {}

  bool operator()(const int32_t* ids, int64_t count) {
    return !share<1>(ids, count) || !share<0x9E3779B1>(ids, count) || look(ids, count);
  }

 private:
  static constexpr uint32_t kBits = 13, kPlaces = 1 << kBits;

  template <uint32_t kFactor>
  bool share(const int32_t* ids, int64_t count) {
    constexpr uint32_t kShift = kFactor == 1 ? 0 : 32 - kBits;  // the product's highest bits are its best
    uint32_t shared = 0;
    ++row_;
    for (int64_t i = 0; i < count; ++i) {
      uint16_t& place = last_row_[((uint32_t(ids[i]) * kFactor) >> kShift) % kPlaces];
      shared |= place == row_;
      place = row_;
    }
    return shared;
  }

  // With a bit per id. The bits are 0 before and after.
  bool look(const int32_t* ids, int64_t count) {
    seen_.resize(vocab_);
    int64_t i = 0;
    for (; i < count && !seen_[size_t(ids[i])]; ++i) seen_[size_t(ids[i])] = true;
    for (int64_t j = 0; j < i; ++j) seen_[size_t(ids[j])] = false;
    return i == count;
  }

  size_t vocab_;
  uint16_t row_ = 0;  // after 2^16 tables a place may be taken for shared, and is looked at
  uint16_t last_row_[kPlaces] = {};
  std::vector<bool> seen_;
};

}  // namespace

int64_t first_bad_top(const int32_t* ids, const float* values, int64_t rows, int64_t k, int32_t vocab) {
  Distinct distinct(vocab);
  for (int64_t row = 0; row < rows; ++row, ids += k, values += k) {
    int32_t count = 0, good = values[0] <= 0;
    for (int64_t i = 1; i < k; ++i) good &= values[i] <= values[i - 1];  // not for NaN
    for (int64_t i = 0; i < k; ++i) {
      const int32_t entry = values[i] > -std::numeric_limits<float>::infinity();
      good &= (ids[i] >= 0) & (ids[i] <= (vocab - 1) * entry);
      count += entry;
    }
    // In order, so that the entries are the first ones.
    if (!good || !distinct(ids, count)) return row;
  }
  return -1;
}

CheckedCodes check_codes(const uint8_t* codes, ptrdiff_t stride, int64_t rows, int64_t columns, uint8_t last,
                         const bool* spread) {
  uint8_t highest = 0;
  for (int64_t row = 0; row < rows; ++row, codes += stride) {
    uint8_t lowest = UINT8_MAX, has_last = 0;
    for (int64_t i = 0; i < columns; ++i) {
      lowest = codes[i] < lowest ? codes[i] : lowest;
      highest = codes[i] > highest ? codes[i] : highest;
      has_last |= uint8_t(codes[i] == last);
    }
    if (lowest || (spread[row] && !has_last)) return {row, highest > last};
  }
  return {-1, highest > last};
}

}  // namespace kdfast::codec
