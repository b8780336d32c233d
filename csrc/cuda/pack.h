// A pack: 16 bytes of a row, which a thread loads, computes and stores at a time. Host and device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "scalar.h"

namespace kdfast::cuda {

template <typename T>
struct alignas(16) Pack {
  static constexpr int kLanes = 16 / sizeof(T);
  T lane[kLanes];
};

KD_INLINE float to_float(float x) { return x; }
KD_INLINE float to_float(__half x) { return __half2float(x); }
KD_INLINE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
KD_INLINE T from_float(float x);
template <>
KD_INLINE float from_float(float x) {
  return x;
}
template <>
KD_INLINE __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
KD_INLINE __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

template <typename To, typename From>
KD_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
KD_INLINE void unpack(const Pack<T>& pack, float (&x)[Pack<T>::kLanes]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kLanes; ++i) x[i] = to_float(pack.lane[i]);
}

// A bfloat16 is the upper half of a float.
KD_INLINE void unpack(const Pack<__nv_bfloat16>& pack, float (&x)[8]) {
  const uint4 words = bit_cast<uint4>(pack);
  const uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = bit_cast<float>(word[i] << 16);
    x[2 * i + 1] = bit_cast<float>(word[i] & 0xffff0000u);
  }
}

// Converts the numbers to the logits' type; 0 in the lanes where `logits` is -inf.
KD_INLINE Pack<float> pack_unmasked(const float (&x)[4], const Pack<float>& logits) {
  Pack<float> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.lane[i] = logits.lane[i] == -kInf ? 0.0f : x[i];
  return out;
}

// Two lanes at a time.
template <typename Pair, typename T, typename Round>
KD_INLINE Pack<T> pack_pairs(const float (&x)[8], const Pack<T>& logits, Pair masked, Round round) {
  Pack<T> out;
  const uint4 words = bit_cast<uint4>(logits);
  const uint32_t word[] = {words.x, words.y, words.z, words.w};
  uint32_t rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t alive = ~__heq2_mask(bit_cast<Pair>(word[i]), masked);
    rounded[i] = bit_cast<uint32_t>(round(x[2 * i], x[2 * i + 1])) & alive;
  }
  return bit_cast<Pack<T>>(uint4{rounded[0], rounded[1], rounded[2], rounded[3]});
}

KD_INLINE Pack<__nv_bfloat16> pack_unmasked(const float (&x)[8], const Pack<__nv_bfloat16>& logits) {
  return pack_pairs(x, logits, __float2bfloat162_rn(-kInf),
                    [](float a, float b) { return __floats2bfloat162_rn(a, b); });
}

KD_INLINE Pack<__half> pack_unmasked(const float (&x)[8], const Pack<__half>& logits) {
  return pack_pairs(x, logits, __float2half2_rn(-kInf), [](float a, float b) { return __floats2half2_rn(a, b); });
}

}  // namespace kdfast::cuda
