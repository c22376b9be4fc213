#include "staging.h"

#include <cstring>

#include "threads.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastinv {
namespace {

constexpr int64_t kPiece = int64_t{1} << 18;  // bytes that a thread takes at once: a few microseconds' worth
constexpr int kLine = 64;                     // bytes that are written at once

uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#if defined(__SSE2__)
// The same of four, each in the upper half of its word with the sign below it: as `_mm_packs_epi32` keeps them.
__m128i rounded(__m128 values) {
  const __m128i bits = _mm_castps_si128(values);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i sum = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(values, values));
  const __m128i all = _mm_or_si128(_mm_andnot_si128(nan, sum), _mm_and_si128(nan, _mm_set1_epi32(0x7fc00000)));
  return _mm_srai_epi32(all, 16);
}
#endif

}  // namespace

void stage(const void* from, void* to, int64_t bytes, int threads) {
  parallel_ranges(threads, bytes, kLine, kPiece, [&](int, int64_t first, int64_t last) {
    const char* source = static_cast<const char*>(from) + first;
    char* target = static_cast<char*>(to) + first;
    int64_t i = 0, size = last - first;
#if defined(__SSE2__)
    if (reinterpret_cast<uintptr_t>(target) % kLine == 0) {
      for (; i + kLine <= size; i += kLine) {
        for (int k = 0; k < kLine; k += 16) {
          const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + k));
          _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + k), values);
        }
      }
      _mm_sfence();
    }
#endif
    std::memcpy(target + i, source + i, static_cast<size_t>(size - i));
  });
}

void stage_bfloat16(const float* from, uint16_t* to, int64_t count, int threads) {
  parallel_ranges(threads, count, kLine / 2, kPiece / 2, [&](int, int64_t first, int64_t last) {
    const float* source = from + first;
    uint16_t* target = to + first;
    int64_t i = 0, size = last - first;
#if defined(__SSE2__)
    constexpr int kValues = kLine / 2;
    if (reinterpret_cast<uintptr_t>(target) % kLine == 0) {
      for (; i + kValues <= size; i += kValues) {
        for (int k = 0; k < kValues; k += 8) {
          const __m128i low = rounded(_mm_loadu_ps(source + i + k)), high = rounded(_mm_loadu_ps(source + i + k + 4));
          _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + k), _mm_packs_epi32(low, high));
        }
      }
      _mm_sfence();
    }
#endif
    for (; i < size; ++i) target[i] = rounded(source[i]);
  });
}

}  // namespace fastinv
