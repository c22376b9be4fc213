// Matrix products of bfloat16 factors with float32 sums, on processors with AVX512-BF16: two products a lane.
#pragma once

#ifdef FASTINV_BFLOAT16
#define FASTINV_TARGET __attribute__((target("avx512bf16")))

// [rows][in] floats as bfloat16, rows padded to whole pairs.
FASTINV_TARGET static void round_rows(const float* in, uint16_t* out, int rows, int channels) {
  const int padded = (channels + 1) / 2 * 2;
  for (int r = 0; r < rows; ++r, in += channels, out += padded) {
    for (int c = 0; c < channels; c += kWidth) {
      const int lanes = channels - c < kWidth ? channels - c : kWidth,
                pairs = padded - c < kWidth ? padded - c : kWidth;
      const __m256bh rounded = _mm512_cvtneps_pbh(load_first(in + c, lanes));
      _mm256_mask_storeu_epi16(out + c, first_lanes(pairs), reinterpret_cast<const __m256i&>(rounded));
    }
  }
}

template <int kVectors, int kRows>
FASTINV_TARGET void bfloat16_tile(const uint16_t* in, int64_t in_step, int pairs, const uint16_t* weights, float* out,
                                  int64_t out_step, int last_lanes) {
  constexpr int kBlock = kVectors * kWidth * 2;
  V acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  }
  const uint16_t* w = weights;
  for (int k = 0; k < pairs; ++k, w += kBlock) {
    __m512bh row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(w + v * kWidth * 2);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      memcpy(&pair, in + r * in_step + 2 * k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], both, row[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store_first(out + r * out_step + v * kWidth, acc[r][v], v + 1 < kVectors ? kWidth : last_lanes);
    }
  }
}

using Bfloat16Tile = void (*)(const uint16_t*, int64_t, int, const uint16_t*, float*, int64_t, int);

template <int kVectors>
Bfloat16Tile bfloat16_tile_for(int rows) {
  constexpr Bfloat16Tile table[] = {bfloat16_tile<kVectors, 1>, bfloat16_tile<kVectors, 2>, bfloat16_tile<kVectors, 3>,
                                    bfloat16_tile<kVectors, 4>, bfloat16_tile<kVectors, 5>, bfloat16_tile<kVectors, 6>};
  return table[rows - 1];
}

void bfloat16_product(const Bfloat16ProductArgs& a) {
  const int padded = (a.in_channels + 1) / 2 * 2, tiles = (a.rows + kMaxTilePixels - 1) / kMaxTilePixels;
  round_rows(a.in, a.rounded, a.rows, a.in_channels);
  const uint16_t* weights = a.weights;
  for (int done = 0; done < a.out_channels; done += kMaxVectors * kWidth) {
    const int left = a.out_channels - done;
    const int vectors = left >= kMaxVectors * kWidth ? kMaxVectors : (left + kWidth - 1) / kWidth;
    const int last_lanes = left >= vectors * kWidth ? kWidth : left - (vectors - 1) * kWidth;
    for (int t = 0, begin = 0; t < tiles; ++t) {
      const int rows = a.rows / tiles + (t < a.rows % tiles ? 1 : 0);
      const Bfloat16Tile tile = vectors == 1   ? bfloat16_tile_for<1>(rows)
                                : vectors == 2 ? bfloat16_tile_for<2>(rows)
                                : vectors == 3 ? bfloat16_tile_for<3>(rows)
                                               : bfloat16_tile_for<4>(rows);
      tile(a.rounded + int64_t{begin} * padded, padded, padded / 2, weights,
           a.out + int64_t{begin} * a.out_channels + done, a.out_channels, last_lanes);
      begin += rows;
    }
    weights += int64_t{padded} * vectors * kWidth;
  }
}
#else
constexpr void (*bfloat16_product)(const Bfloat16ProductArgs&) = nullptr;
#endif
