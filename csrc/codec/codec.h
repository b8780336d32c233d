// The bit layout of entry blocks: FORMAT.md's "Entry blocks" in code. Host and device share it.
//
// A row is a few header fields (small integers, FORMAT.md's columns; the first is the number of entries) and its
// entries, each a rank and a value, in ascending order of rank. An integer is coded as a symbol, entropy-coded in its
// context, and raw low bits. If the model knows the total of a row's values, each plus 1, the entries end when they
// reach it, and the number of entries is not coded.
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
constexpr uint32_t kLowest = 1u << 16;                      // a coder's state lies in [2^16, 2^32) between symbols
constexpr uint32_t kEscape = 255;                           // 8 raw bits follow: a symbol that the model has not seen
constexpr uint32_t kNumberMantissa = 4, kRankMantissa = 1;  // bits below the leading one that are part of the symbol
constexpr uint32_t kMaxFields = 8;
constexpr uint32_t kMaxNumber = 1u << 18, kMaxRank = 1u << 24;  // exclusive limits: of fields and values; of ranks
constexpr uint32_t kRankClasses = 24, kRestClasses = 12;
constexpr uint32_t kRankContexts = kRankClasses * kRestClasses, kValueContexts = kRankContexts;

// A number as a symbol and `bits` low bits: small numbers are their own symbols, larger ones share 2^mantissa symbols
// per octave.
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

// Truncated binary for a number below `range`: the first short_codes(range) numbers take floor_log2(range) bits, the
// others one more.
KDFAST_BOTH uint32_t floor_log2(uint32_t range) { return bit_length(range) - 1; }
KDFAST_BOTH uint32_t short_codes(uint32_t range) { return (2u << floor_log2(range)) - range; }

// Contexts are numbered consecutively: fields, then ranks, then values.

// A rank's octave; kFirstEntry stands for the rank before the first.
constexpr uint32_t kFirstEntry = kRankClasses - 1;

KDFAST_BOTH uint32_t octave(uint32_t rank_symbol) {
  const uint32_t o = rank_symbol < 2 ? rank_symbol : rank_symbol / 2 + 1;
  return o < kFirstEntry ? o : kFirstEntry - 1;
}

// The class of how much of a row is left, which is at least 1. Upper ends: 1, 2, 3, 4, 6, 10, 18, 34, 66, 130, 258,
// none.
KDFAST_BOTH uint32_t rest_class(uint32_t left) {
  if (left <= 4) return left - 1;
  const uint32_t c = bit_length(left - 3) + 2;
  return c < kRestClasses ? c : kRestClasses - 1;
}

// A rank's context: the octave of the rank before it, and how much is left. Order statistics say why: the more entries
// are left, the lower the next rank tends to be.
KDFAST_BOTH uint32_t rank_context(uint32_t fields, uint32_t octave_before, uint32_t left) {
  return fields + octave_before * kRestClasses + rest_class(left);
}

// A value's context: the octave of its rank, and how much is left.
KDFAST_BOTH uint32_t value_context(uint32_t fields, uint32_t rank_octave, uint32_t left) {
  return fields + kRankContexts + rank_octave * kRestClasses + rest_class(left);
}

KDFAST_BOTH uint32_t contexts(uint32_t fields) { return fields + kRankContexts + kValueContexts; }

}  // namespace kdfast::codec
