// The vector vocabulary for AVX2 with FMA: 8 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define FASTINV_INLINE static inline __attribute__((always_inline))

#include "vec/eight.h"

namespace fastinv {
namespace {

using V = __m256;
using Mask = __m256;

constexpr int kWidth = 8;
constexpr int kMaxVectors = 2;  // 6 × 2 accumulators + 2 weights + 1 broadcast: 15 of 16 registers
constexpr bool kFreeMasks = false;
constexpr int kDotPixels[] = {0, 6, 4, 3, 2};

FASTINV_INLINE __m256i first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

FASTINV_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
// A load that GCC does not repeat: it would read a plain operand anew for every product, three times as many loads,
// most of which cross lines.
FASTINV_INLINE V load_once(const float* p) {
  V v = load(p);
  asm("" : "+x"(v));
  return v;
}
FASTINV_INLINE V load_first(const float* p, int n) {
  return n == kWidth ? load(p) : _mm256_maskload_ps(p, first_lanes(n));
}
FASTINV_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
FASTINV_INLINE void store_first(float* p, V v, int n) {
  n == kWidth ? store(p, v) : _mm256_maskstore_ps(p, first_lanes(n), v);  // masked stores are slow on AMD
}
// The lower half of the lanes.
FASTINV_INLINE V load_low(const float* p) { return _mm256_zextps128_ps256(_mm_loadu_ps(p)); }
FASTINV_INLINE void store_low(float* p, V v) { _mm_storeu_ps(p, _mm256_castps256_ps128(v)); }
// The first n lanes, and zeros.
FASTINV_INLINE V first_of(V v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first_lanes(n))); }
// Lanes `begin` to `end` of a vector, cut to those there are; memory under the other lanes is not touched.
using Lanes = __m256i;
FASTINV_INLINE Lanes lanes_between(int begin, int end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
}
FASTINV_INLINE V load_lanes(const float* p, Lanes lanes) { return _mm256_maskload_ps(p, lanes); }
FASTINV_INLINE V set1(float x) { return _mm256_set1_ps(x); }
FASTINV_INLINE V zero() { return _mm256_setzero_ps(); }

FASTINV_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
FASTINV_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
FASTINV_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
FASTINV_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
FASTINV_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
FASTINV_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
FASTINV_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
FASTINV_INLINE V sqrt(V a) { return _mm256_sqrt_ps(a); }
FASTINV_INLINE V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FASTINV_INLINE V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTINV_INLINE float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Lane i is the sum of the lanes of a[i].
FASTINV_INLINE V sum_each(const V* a) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// The sum of as many vectors as there are lanes, in the order in which sum_each adds lanes.
FASTINV_INLINE V sum_as_lanes(const V* a) {
  return add(add(add(a[0], a[1]), add(a[2], a[3])), add(add(a[4], a[5]), add(a[6], a[7])));
}

// 2^n for a whole n from −126 to 127.
FASTINV_INLINE V exp2_whole(V n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// Other types, widened to floats; and whole numbers from 0 to 255 as bytes, or as bfloat16, halves rounded to even.
// The latter in integers, so that denormals, which may be flushed, are no special case.
FASTINV_INLINE V load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTINV_INLINE V load_bfloat16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FASTINV_INLINE V load_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTINV_INLINE V load_bytes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
FASTINV_INLINE void store_bytes(uint8_t* p, V v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
FASTINV_INLINE void store_bfloat16(uint16_t* p, V v) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

// a0 b0 a1 b1 …
FASTINV_INLINE void interleave(V a, V b, V* low, V* high) {
  const V even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  *low = _mm256_permute2f128_ps(even, odd, 0x20);
  *high = _mm256_permute2f128_ps(even, odd, 0x31);
}

// The even and the odd floats of `low` and then `high`.
FASTINV_INLINE void deinterleave(V low, V high, V* even, V* odd) {
  const V first = _mm256_permute2f128_ps(low, high, 0x20), second = _mm256_permute2f128_ps(low, high, 0x31);
  *even = _mm256_shuffle_ps(first, second, 0x88);
  *odd = _mm256_shuffle_ps(first, second, 0xdd);
}

FASTINV_INLINE Mask less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
FASTINV_INLINE Mask less_equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
FASTINV_INLINE Mask equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
FASTINV_INLINE V select(Mask m, V a, V b) { return _mm256_blendv_ps(b, a, m); }

FASTINV_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }

// A bit for each lane.
constexpr int kMaskBytes = 1;
FASTINV_INLINE void store_mask(uint8_t* p, Mask m) { *p = static_cast<uint8_t>(_mm256_movemask_ps(m)); }
FASTINV_INLINE Mask load_mask(const uint8_t* p) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*p), lane), lane));
}

FASTINV_INLINE V gather(const float* base, const int32_t* index) {
  return _mm256_i32gather_ps(base, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
}

FASTINV_INLINE void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  transpose_eight(in, in_stride, out, out_stride);
}

}  // namespace
}  // namespace fastinv
