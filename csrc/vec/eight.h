// What AVX2's vectors and the halves of AVX-512's share.
#pragma once

namespace fastinv {
namespace {

// An 8×8 block turned over: 4×4 within 128-bit lanes, then the lanes.
FASTINV_INLINE void transpose_eight(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // r[i + j], lane l: column 4·l + j of rows i to i + 3
    for (int half = 0; half < 2; ++half) {
      const __m256d low = _mm256_castps_pd(t[i + half]), high = _mm256_castps_pd(t[i + 2 + half]);
      r[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      r[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(out + j * out_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps(out + (4 + j) * out_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}

}  // namespace
}  // namespace fastinv
