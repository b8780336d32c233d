// The bit layout of entry blocks: FORMAT.md's "Entry blocks" in code. Host and device share it.
//
// A row is some fields (small integers; the first is the number of entries) and its entries, in ascending order of
// rank, each a rank and a value. An integer is coded as a symbol, entropy-coded in its context, and raw low bits.
// Where the values of a row, each plus 1, have a known total, that ends the row, and its first column is not coded.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KDFAST_BOTH __host__ __device__ inline
#else
#define KDFAST_BOTH constexpr
#endif

namespace kdfast::codec {

constexpr uint32_t kLanes = 32;     // rows whose symbols interleave, each in its own coder
constexpr uint32_t kProbBits = 12;  // frequencies of a context sum to 2^12
constexpr uint32_t kProbs = 1u << kProbBits;
constexpr uint32_t kLowest = 1u << 16;  // a coder's state lies in [2^16, 2^32) between symbols
constexpr uint32_t kEscape = 255;       // this symbol is followed by 8 raw bits: a symbol the model has not seen
constexpr uint32_t kNumberMantissa = 4, kRankMantissa = 1;  // high bits that are part of the symbol
constexpr uint32_t kMaxFields = 8;
constexpr uint32_t kMaxNumber = 1u << 18, kMaxRank = 1u << 24;  // fields and values, and ranks, are below
constexpr uint32_t kRankClasses = 24, kRestClasses = 12;
constexpr uint32_t kRankContexts = kRankClasses * kRestClasses, kValueContexts = kRankContexts;

// x as a symbol and `bits` low bits: small numbers are symbols, larger ones share 2^mantissa symbols per octave.
struct Split {
  uint32_t symbol, bits, low;
};

KDFAST_BOTH uint32_t bit_length(uint32_t x) {
#ifdef __CUDA_ARCH__
  return 32 - __clz(int(x));
#else
  return x ? 32 - uint32_t(__builtin_clz(x)) : 0;
#endif
}

KDFAST_BOTH Split split(uint32_t x, uint32_t mantissa) {
  const uint32_t length = bit_length(x);
  if (length <= mantissa + 1) return {x, 0, 0};
  const uint32_t bits = length - 1 - mantissa;
  return {(bits << mantissa) + (x >> bits), bits, x & ((1u << bits) - 1)};
}

KDFAST_BOTH uint32_t low_bits(uint32_t symbol, uint32_t mantissa) {
  return symbol < (2u << mantissa) ? 0 : (symbol >> mantissa) - 1;
}

KDFAST_BOTH uint32_t join(uint32_t symbol, uint32_t bits, uint32_t low, uint32_t mantissa) {
  return bits ? (((symbol & ((1u << mantissa) - 1)) | (1u << mantissa)) << bits) + low : symbol;
}

// How many bits a number below `range` takes in truncated binary: this many, or one more if they are all above.
KDFAST_BOTH uint32_t floor_log2(uint32_t range) { return bit_length(range) - 1; }
KDFAST_BOTH uint32_t short_codes(uint32_t range) { return (2u << floor_log2(range)) - range; }

// Contexts, numbered through: fields, then ranks, then values.

// The octave of a rank, and what stands for it where there is no rank before.
constexpr uint32_t kFirstEntry = kRankClasses - 1;

KDFAST_BOTH uint32_t octave(uint32_t rank_symbol) {
  const uint32_t o = rank_symbol < 2 ? rank_symbol : rank_symbol / 2 + 1;
  return o < kFirstEntry ? o : kFirstEntry - 1;
}

// How much of a row is left, at least 1: 1, 2, 3, 4, then up to 6, 10, 18, 34, 66, 130, 258, and more.
KDFAST_BOTH uint32_t rest_class(uint32_t left) {
  if (left <= 4) return left - 1;
  const uint32_t c = bit_length(left - 3) + 2;
  return c < kRestClasses ? c : kRestClasses - 1;
}

// Of a rank: the octave of the rank before it, and how much is left. That is the law of order statistics: the smallest
// of n draws lies the lower, the larger n is.
KDFAST_BOTH uint32_t rank_context(uint32_t fields, uint32_t octave_before, uint32_t left) {
  return fields + octave_before * kRestClasses + rest_class(left);
}

// Of a value: its own rank's octave, and how much is left.
KDFAST_BOTH uint32_t value_context(uint32_t fields, uint32_t rank_octave, uint32_t left) {
  return fields + kRankContexts + rank_octave * kRestClasses + rest_class(left);
}

KDFAST_BOTH uint32_t contexts(uint32_t fields) { return fields + kRankContexts + kValueContexts; }

}  // namespace kdfast::codec
