// The vector vocabulary for any processor: 4 floats through the compiler's vector extension (GCC, Clang).
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#define FASTINV_TILES
#define FASTINV_INLINE static inline __attribute__((always_inline))

namespace fastinv {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

constexpr int kWidth = 4;
constexpr int kMaxVectors = 2;
constexpr bool kFreeMasks = false;
constexpr int kDotPixels[] = {0, 6, 4, 3, 2};

FASTINV_INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTINV_INLINE V load_once(const float* p) { return load(p); }
FASTINV_INLINE V load_first(const float* p, int n) {
  if (n == kWidth) return load(p);
  V v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
FASTINV_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }
FASTINV_INLINE void store_first(float* p, V v, int n) {
  if (n == kWidth) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
// The lower half of the lanes.
FASTINV_INLINE V load_low(const float* p) { return load_first(p, kWidth / 2); }
FASTINV_INLINE void store_low(float* p, V v) { store_first(p, v, kWidth / 2); }
// The first n lanes, and zeros.
FASTINV_INLINE V first_of(V v, int n) {
  for (int i = n; i < kWidth; ++i) v[i] = 0.0f;
  return v;
}
// Lanes `begin` to `end` of a vector, cut to those there are; memory under the other lanes is not touched.
struct Lanes {
  int begin, end;
};
FASTINV_INLINE Lanes lanes_between(int begin, int end) { return {begin < 0 ? 0 : begin, end < kWidth ? end : kWidth}; }
FASTINV_INLINE V load_lanes(const float* p, Lanes lanes) {
  if (lanes.begin == 0 && lanes.end == kWidth) return load(p);
  V v = {};
  for (int i = lanes.begin; i < lanes.end; ++i) v[i] = p[i];
  return v;
}
FASTINV_INLINE V set1(float x) { return V{x, x, x, x}; }
FASTINV_INLINE V zero() { return V{}; }

FASTINV_INLINE V add(V a, V b) { return a + b; }
FASTINV_INLINE V sub(V a, V b) { return a - b; }
FASTINV_INLINE V mul(V a, V b) { return a * b; }
FASTINV_INLINE V div(V a, V b) { return a / b; }
FASTINV_INLINE V fma(V a, V b, V c) { return a * b + c; }

FASTINV_INLINE Mask less(V a, V b) { return a < b; }
FASTINV_INLINE Mask less_equal(V a, V b) { return a <= b; }
FASTINV_INLINE Mask equal(V a, V b) { return a == b; }
FASTINV_INLINE V select(Mask m, V a, V b) { return m ? a : b; }

FASTINV_INLINE Mask both(Mask a, Mask b) { return a & b; }

// A bit for each lane.
constexpr int kMaskBytes = 1;
FASTINV_INLINE void store_mask(uint8_t* p, Mask m) {
  *p = static_cast<uint8_t>((m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8));
}
FASTINV_INLINE Mask load_mask(const uint8_t* p) {
  const Mask lane = {1, 2, 4, 8};
  return ((Mask{} + *p) & lane) == lane;
}

FASTINV_INLINE V min(V a, V b) { return a < b ? a : b; }
FASTINV_INLINE V max(V a, V b) { return a > b ? a : b; }
FASTINV_INLINE V sqrt(V a) { return V{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
FASTINV_INLINE V abs(V a) { return a < zero() ? -a : a; }
FASTINV_INLINE V round(V a) {
  const V magic = set1(12582912.0f);  // 1.5 · 2^23: adding it rounds |a| < 2^22 to a whole number
  return (a + magic) - magic;
}
FASTINV_INLINE float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }

// Lane i is the sum of the lanes of a[i].
FASTINV_INLINE V sum_each(const V* a) { return V{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}; }

// The sum of as many vectors as there are lanes, in the order in which sum_each adds lanes.
FASTINV_INLINE V sum_as_lanes(const V* a) { return (a[0] + a[2]) + (a[1] + a[3]); }

// 2^n for a whole n from −126 to 127.
FASTINV_INLINE V exp2_whole(V n) {
  const Mask biased = __builtin_convertvector(n, Mask) + 127;
  const Mask bits = biased << 23;
  V v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Other types, widened to floats; and whole numbers from 0 to 255 as bytes, or as bfloat16, halves rounded to even.
// The latter in integers, so that denormals, which may be flushed, are no special case.
FASTINV_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FASTINV_INLINE float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // Inf, NaN
  const float size = rest < 0x400u ? static_cast<float>(rest) / 16777216.0f           // subnormal: multiples of 2^−24
                                   : from_bits((rest << 13) + (112u << 23));          // the biases differ by 112
  return sign ? -size : size;
}
FASTINV_INLINE V load_half(const uint16_t* p) {
  return V{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])};
}
FASTINV_INLINE V load_bfloat16(const uint16_t* p) {
  const auto wide = [](uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); };
  return V{wide(p[0]), wide(p[1]), wide(p[2]), wide(p[3])};
}
template <class Byte>
FASTINV_INLINE V load_bytes(const Byte* p) {
  return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
FASTINV_INLINE void store_bytes(uint8_t* p, V v) {
  const V whole = round(v);
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(whole[i]);
}
FASTINV_INLINE void store_bfloat16(uint16_t* p, V v) {
  for (int i = 0; i < kWidth; ++i) {
    uint32_t bits;
    memcpy(&bits, reinterpret_cast<const char*>(&v) + sizeof bits * i, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
}

// What AMX's tiles do (vec/avx512.h), so that what uses them can be tested anywhere.
class Tiles {
 public:
  void begin() {}
  void end() {}
  template <int kTile>
  void clear() {
    memset(tiles_[kTile], 0, sizeof tiles_[kTile]);
  }
  template <int kTile>
  void load(const void* from, int64_t step) {
    for (int r = 0; r < 16; ++r) memcpy(tiles_[kTile][r], static_cast<const char*>(from) + r * step, 64);
  }
  template <int kTile>
  void store(void* to, int64_t step) {
    for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(to) + r * step, tiles_[kTile][r], 64);
  }
  // It reads and writes nothing but tiles: sanitizers would find nothing, and make it several times as slow.
  template <int kSums, int kA, int kB>
  __attribute__((no_sanitize("address", "undefined"))) void multiply() {
    float a[2][16][16], b[2][16][16];  // the two numbers of each pair
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        uint32_t pairs[2];
        memcpy(&pairs[0], &tiles_[kA][i][j], sizeof pairs[0]);
        memcpy(&pairs[1], &tiles_[kB][i][j], sizeof pairs[1]);
        const uint32_t halves[4] = {pairs[0] << 16, pairs[0] & 0xffff0000u, pairs[1] << 16, pairs[1] & 0xffff0000u};
        memcpy(&a[0][i][j], &halves[0], sizeof halves[0]);
        memcpy(&a[1][i][j], &halves[1], sizeof halves[1]);
        memcpy(&b[0][i][j], &halves[2], sizeof halves[2]);
        memcpy(&b[1][i][j], &halves[3], sizeof halves[3]);
      }
    }
    for (int r = 0; r < 16; ++r) {
      for (int k = 0; k < 16; ++k) {
        for (int c = 0; c < 16; ++c) tiles_[kSums][r][c] += a[0][r][k] * b[0][k][c] + a[1][r][k] * b[1][k][c];
      }
    }
  }

 private:
  float tiles_[8][16][16];
};

// a0 b0 a1 b1 …
FASTINV_INLINE void interleave(V a, V b, V* low, V* high) {
  *low = V{a[0], b[0], a[1], b[1]};
  *high = V{a[2], b[2], a[3], b[3]};
}

// The even and the odd floats of `low` and then `high`.
FASTINV_INLINE void deinterleave(V low, V high, V* even, V* odd) {
  *even = V{low[0], low[2], high[0], high[2]};
  *odd = V{low[1], low[3], high[1], high[3]};
}

FASTINV_INLINE V gather(const float* base, const int32_t* index) {
  return V{base[index[0]], base[index[1]], base[index[2]], base[index[3]]};
}

// A 4×4 block turned over.
FASTINV_INLINE void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int j = 0; j < 4; ++j) {
    const V column = {in[j], in[in_stride + j], in[2 * in_stride + j], in[3 * in_stride + j]};
    store(out + j * out_stride, column);
  }
}

}  // namespace
}  // namespace fastinv
