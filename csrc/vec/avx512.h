// The vector vocabulary for AVX-512 (F, BW, DQ, VL): 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define FASTINV_FAST_HALVES  // two multiply-adds of 256 bits a cycle, as Zen 4 has one of 512
#define FASTINV_BFLOAT16     // products of them, on processors that also have AVX512-BF16
#if defined(__clang__) || __GNUC__ > 10
#define FASTINV_TILES  // and of tiles of them, on those that also have AMX; older assemblers do not know it
#endif
#define FASTINV_INLINE static inline __attribute__((always_inline))

#include "vec/eight.h"

namespace fastinv {
namespace {

using V = __m512;
using Mask = __mmask16;

constexpr int kWidth = 16;
constexpr int kMaxVectors = 4;                 // 6 × 4 accumulators + 4 weights + 1 broadcast: 29 of 32 registers
constexpr bool kFreeMasks = true;              // a masked load costs what a plain one does
constexpr int kDotPixels[] = {0, 6, 6, 5, 4};  // with as many outputs at most 16 sums: one vector

FASTINV_INLINE Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }

FASTINV_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
// A load that GCC does not repeat: it would read a plain operand anew for every product, three times as many loads,
// most of which cross lines.
FASTINV_INLINE V load_once(const float* p) {
  V v = load(p);
  asm("" : "+v"(v));
  return v;
}
FASTINV_INLINE V load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FASTINV_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
FASTINV_INLINE void store_first(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
// The first n lanes, and zeros.
FASTINV_INLINE V first_of(V v, int n) { return _mm512_maskz_mov_ps(first_lanes(n), v); }
// Lanes `begin` to `end` of a vector, cut to those there are; memory under the other lanes is not touched.
using Lanes = Mask;
FASTINV_INLINE Lanes lanes_between(int begin, int end) {
  const unsigned below = begin <= 0 ? 0u : begin >= kWidth ? 0xffffu : (1u << begin) - 1u;
  const unsigned upto = end <= 0 ? 0u : end >= kWidth ? 0xffffu : (1u << end) - 1u;
  return static_cast<Lanes>(upto & ~below);
}
FASTINV_INLINE V load_lanes(const float* p, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
FASTINV_INLINE V set1(float x) { return _mm512_set1_ps(x); }
FASTINV_INLINE V zero() { return _mm512_setzero_ps(); }

FASTINV_INLINE __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
FASTINV_INLINE __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
FASTINV_INLINE __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
FASTINV_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

// Half a vector, as `Wide` in kernels/lanes.h is a whole one.
struct Narrow {
  using Vector = __m256;
  static constexpr int kLanes = kWidth / 2;
  FASTINV_INLINE Vector zeros() { return _mm256_setzero_ps(); }
  FASTINV_INLINE Vector get(const float* p) { return _mm256_loadu_ps(p); }
  FASTINV_INLINE Vector get_lanes(const float* p, Lanes lanes) {
    return _mm256_maskz_loadu_ps(static_cast<__mmask8>(lanes), p);
  }
  FASTINV_INLINE Vector all(float x) { return _mm256_set1_ps(x); }
  FASTINV_INLINE V widen(Vector v) { return _mm512_zextps256_ps512(v); }
  FASTINV_INLINE Vector cut(V v) { return _mm512_castps512_ps256(v); }
  // Without masks: later loads take what this stores from the store buffer, and wait where there was one.
  FASTINV_INLINE void put(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  FASTINV_INLINE void put_first(float* p, Vector v, int n) {
    _mm256_mask_storeu_ps(p, static_cast<__mmask8>(first_lanes(n)), v);
  }
};

FASTINV_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
FASTINV_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
FASTINV_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
FASTINV_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
FASTINV_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
FASTINV_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
FASTINV_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
FASTINV_INLINE V sqrt(V a) { return _mm512_sqrt_ps(a); }
FASTINV_INLINE V abs(V a) { return _mm512_abs_ps(a); }
FASTINV_INLINE V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTINV_INLINE float sum(V a) { return _mm512_reduce_add_ps(a); }

// Lane i is the sum of the lanes of a[i].
FASTINV_INLINE V sum_each(const V* a) {
  __m512 pair[8], four[4], eight[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // 128-bit lanes: of a[2i] and a[2i + 1] in turns
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pair[2 * i]), high = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

// The sum of as many vectors as there are lanes, in the order in which sum_each adds lanes.
FASTINV_INLINE V sum_as_lanes(const V* a) {
  V four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = add(add(a[4 * i], a[4 * i + 2]), add(a[4 * i + 1], a[4 * i + 3]));
  return add(add(four[0], four[1]), add(four[2], four[3]));
}

// 2^n for a whole n from −126 to 127.
FASTINV_INLINE V exp2_whole(V n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

FASTINV_INLINE Mask less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FASTINV_INLINE Mask less_equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
FASTINV_INLINE Mask equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FASTINV_INLINE V select(Mask m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }

FASTINV_INLINE Mask both(Mask a, Mask b) { return a & b; }

// A bit for each lane.
constexpr int kMaskBytes = 2;
FASTINV_INLINE void store_mask(uint8_t* p, Mask m) { *reinterpret_cast<uint16_t*>(p) = m; }
FASTINV_INLINE Mask load_mask(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }

FASTINV_INLINE V gather(const float* base, const int32_t* index) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(index), base, 4);
}

// Other types, widened to floats; and whole numbers from 0 to 255 as bytes, or as bfloat16, halves rounded to even.
// The latter in integers, so that denormals, which may be flushed, are no special case.
FASTINV_INLINE V load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTINV_INLINE V load_bfloat16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FASTINV_INLINE V load_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FASTINV_INLINE V load_bytes(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FASTINV_INLINE void store_bytes(uint8_t* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
FASTINV_INLINE void store_bfloat16(uint16_t* p, V v) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

#ifdef FASTINV_TILES
// Eight tiles of 16 rows of 64 bytes, between begin() and end(): AMX, which only some of these processors have. In
// assembly, since GCC's own functions take the numbers of tiles as text alone; without a destructor, for which each
// set's kernels would need the library's parts for exceptions.
struct Tiles {
  FASTINV_INLINE void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  FASTINV_INLINE void end() { asm volatile("tilerelease"); }
  template <int kTile>
  FASTINV_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Rows so many bytes apart.
  template <int kTile>
  FASTINV_INLINE void load(const void* from, int64_t step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(kTile) : "memory");
  }
  template <int kTile>
  FASTINV_INLINE void store(void* to, int64_t step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(kTile) : "memory");
  }
  // sums[r][c] += Σ_k a[r][k] · b[k][c] of bfloat16 numbers, those of b in pairs: [k / 2][c][k % 2].
  template <int kSums, int kA, int kB>
  FASTINV_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
  }
};
#endif

// a0 b0 a1 b1 …
FASTINV_INLINE void interleave(V a, V b, V* low, V* high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *low = _mm512_permutex2var_ps(a, first, b);
  *high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}

// The even and the odd floats of `low` and then `high`.
FASTINV_INLINE void deinterleave(V low, V high, V* even, V* odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(low, first, high);
  *odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
}

// A 16×16 block turned over: 4×4 within 128-bit lanes, then the lanes as a 4×4 block.
FASTINV_INLINE void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j], lane l: column 4·l + j of rows i to i + 3
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(t[i + half]), high = _mm512_castps_pd(t[i + 2 + half]);
      r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even0 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd0 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_ps(out + j * out_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
    _mm512_storeu_ps(out + (4 + j) * out_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    _mm512_storeu_ps(out + (8 + j) * out_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    _mm512_storeu_ps(out + (12 + j) * out_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
}

}  // namespace
}  // namespace fastinv
