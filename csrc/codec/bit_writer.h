// Bits to bytes, low-order bits first.
#pragma once

#include <cstdint>
#include <vector>

namespace kdfast::codec {

// Appends to `bytes`. The last bits are there after `align`.
class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>& bytes) : bytes_(bytes) {}

  // The low `bits` bits of `value`, which has no others.
  void put(uint32_t value, uint32_t bits) {
    pending_ |= uint64_t(value) << filled_;
    for (filled_ += bits; filled_ >= 8; filled_ -= 8, pending_ >>= 8) bytes_.push_back(uint8_t(pending_));
  }

  // Zeros up to a whole byte.
  void align() {
    if (filled_) bytes_.push_back(uint8_t(pending_));
    pending_ = filled_ = 0;
  }

 private:
  std::vector<uint8_t>& bytes_;
  uint64_t pending_ = 0;
  uint32_t filled_ = 0;
};

}  // namespace kdfast::codec
