// Numbers of two bytes, two in a word, the first in the low half: on the GPU and on the host.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// What is asked by the host and in a block, and what is done in a block alone.
#ifdef __CUDACC__
#define FASTINV_BOTH __host__ __device__
#define FASTINV_BLOCK __device__
#else
#define FASTINV_BOTH
#define FASTINV_BLOCK
#endif

namespace fastinv {

// The types, as tags: `pack` makes two of them.
struct Bfloat16 {
  static constexpr uint32_t kInfinity = 0x7f80;
};
struct Float16 {
  static constexpr uint32_t kInfinity = 0x7c00;
};

// 16 bytes that are read at once, and 8.
struct alignas(16) Words {
  uint32_t at[4];
};
struct alignas(8) TwoWords {
  uint32_t at[2];
};

#ifdef __CUDACC__
FASTINV_BLOCK inline float as_float(uint32_t value) { return __uint_as_float(value); }

FASTINV_BLOCK inline uint32_t pack(Bfloat16, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
FASTINV_BLOCK inline uint32_t pack(Float16, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// The same of max(value, 0).
FASTINV_BLOCK inline uint32_t pack_relu(Bfloat16, float low, float high) {
  uint32_t both;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
FASTINV_BLOCK inline uint32_t pack_relu(Float16, float low, float high) {
  uint32_t both;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Bytes 2·high and 2·high + 1 of both, those of a in the low half.
FASTINV_BLOCK inline uint32_t halves(uint32_t a, uint32_t b, int high) {
  return __byte_perm(a, b, high ? 0x7632 : 0x5410);
}

FASTINV_BLOCK inline void unpack(Float16, uint32_t both, float& low, float& high) {
  const float2 values = __half22float2(reinterpret_cast<const __half2&>(both));
  low = values.x;
  high = values.y;
}
FASTINV_BLOCK inline void unpack(Bfloat16, uint32_t both, float& low, float& high) {
  low = as_float(both << 16);
  high = as_float(both & 0xffff0000u);
}

// Each half of a times that of b.
FASTINV_BLOCK inline uint32_t times(Float16, uint32_t a, uint32_t b) {
  const __half2 both = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(both);
}

#else
inline uint32_t bits(float value) {
  uint32_t result;
  std::memcpy(&result, &value, 4);
  return result;
}
inline float as_float(uint32_t value) {
  float result;
  std::memcpy(&result, &value, 4);
  return result;
}
inline uint32_t rounded(Bfloat16, float value) {
  const uint32_t all = bits(value);
  return value != value ? 0x7fffu : (all + 0x7fffu + (all >> 16 & 1u)) >> 16;
}
inline uint32_t rounded(Float16, float value) {
  const uint32_t sign = bits(value) >> 16 & 0x8000u, size = bits(value) & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7e00u;
  if (size >= 0x477ff000u) return sign | 0x7c00u;  // from 65,520 on
  // Below 2^-14 steps are of 2^-24, as floats' from 0.5 on.
  if (size < 0x38800000u) return sign | (bits(as_float(size) + 0.5f) - bits(0.5f));
  return sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
}
inline float widened(Bfloat16, uint32_t half) { return as_float(half << 16); }
inline float widened(Float16, uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | rest << 13);
  return as_float(sign | bits(as_float(rest << 13) * as_float(0x77800000u)));  // times 2^112
}
template <class Type>
uint32_t pack(Type type, float low, float high) {
  return rounded(type, low) | rounded(type, high) << 16;
}
template <class Type>
uint32_t pack_relu(Type type, float low, float high) {
  return pack(type, low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
}
inline uint32_t halves(uint32_t a, uint32_t b, int high) {
  return high ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
}
template <class Type>
void unpack(Type type, uint32_t both, float& low, float& high) {
  low = widened(type, both & 0xffffu);
  high = widened(type, both >> 16);
}
inline uint32_t times(Float16 type, uint32_t a, uint32_t b) {
  float a_low, a_high, b_low, b_high;
  unpack(type, a, a_low, a_high);
  unpack(type, b, b_low, b_high);
  return pack(type, a_low * b_low, a_high * b_high);
}
#endif

// Two numbers as sums of two of float16 each: 22 of float32's 24 bits, or what there is above 2^-25.
struct alignas(8) Halved {
  uint32_t high, low;
};
FASTINV_BLOCK inline Halved halved(float first, float second) {
  const uint32_t high = pack(Float16{}, first, second);
  float a, b;
  unpack(Float16{}, high, a, b);
  return {high, pack(Float16{}, first - a, second - b)};
}

}  // namespace fastinv
