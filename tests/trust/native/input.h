// A fuzzer's input, taken from the front: first parameters, then the bytes that are decoded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

struct Input {
  const uint8_t* data;
  size_t size;

  // The next `bytes` bytes as a number; zeros where the input has ended.
  uint32_t take(size_t bytes = 1) {
    uint8_t number[4] = {};
    const size_t n = bytes < size ? bytes : size;
    if (n) std::memcpy(number, data, n);
    data += n;
    size -= n;
    uint32_t out;
    std::memcpy(&out, number, 4);
    return out;
  }
};

// What must hold of anything that a decoder accepts: a crash if not.
inline void require(bool condition) {
  if (!condition) std::abort();
}
