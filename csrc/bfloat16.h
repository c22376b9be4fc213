// Numbers of 16 bits: the upper half of a float32's.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastinv {

// Rounded to the nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace fastinv
