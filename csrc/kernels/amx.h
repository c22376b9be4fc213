// Convolutions as products of tiles of bfloat16 numbers: two tiles of pixels times two of output channels at a time, so
// that each tile that is loaded, half as fast as two are multiplied, serves two products; where there is one tile of
// output channels, four of pixels.
#pragma once

#ifdef FASTINV_TILES

#include "kernels/bfloat16.h"
#include "kernels/transpose.h"

#ifdef FASTINV_BFLOAT16
#define FASTINV_AMX_TARGET FASTINV_TARGET
// kAmxDepth floats.
FASTINV_TARGET static inline void store_depth(const V* in, uint16_t* out) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(in[1], in[0]));
}
#else
#define FASTINV_AMX_TARGET
static inline void store_depth(const V* in, uint16_t* out) {
  for (int v = 0; v < kAmxDepth / kWidth; ++v) store_bfloat16(out + v * kWidth, in[v]);
}
#endif

// kAmxDepth floats of which the first n are there, and zeros.
FASTINV_AMX_TARGET static inline void round_depth(const float* in, uint16_t* out, int n) {
  V all[kAmxDepth / kWidth];
#pragma GCC unroll 8
  for (int v = 0; v < kAmxDepth / kWidth; ++v) {
    const int some = n - v * kWidth;
    all[v] = some >= kWidth ? load(in + v * kWidth) : some > 0 ? load_first(in + v * kWidth, some) : zero();
  }
  store_depth(all, out);
}

#ifdef FASTINV_BFLOAT16
// kAmxDepth channels of which the first n are there, of so many pixels, one after the other: [pixel][channel]. Rounded
// first, two channels to a float's memory, it takes half the moves of floats turned over.
FASTINV_TARGET static void turn_depth(const float* in, int64_t in_channel, int n, int pixels, uint16_t* out,
                                      int64_t out_step) {
  const __m512i pair = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                        5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  alignas(64) float pairs[kAmxDepth / 2][kWidth];
  for (int c = 0; c < kAmxDepth; c += 2) {
    const V low = c < n ? load_first(in + c * in_channel, pixels) : zero();
    const V high = c + 1 < n ? load_first(in + (c + 1) * in_channel, pixels) : zero();
    _mm512_store_si512(pairs[c / 2], _mm512_permutexvar_epi16(pair, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
  }
  transpose_block(pairs[0], kWidth, reinterpret_cast<float*>(out), out_step / 2);
}
#else
static void turn_depth(const float* in, int64_t in_channel, int n, int pixels, uint16_t* out, int64_t out_step) {
  for (int p = 0; p < pixels; ++p) {
    float channels[kAmxDepth];
    for (int c = 0; c < n; ++c) channels[c] = in[c * in_channel + p];
    round_depth(channels, out + p * out_step, n);
  }
}
#endif

FASTINV_INLINE void amx_fetch(AmxAhead& ahead) {
  constexpr int kLine = 64;
  for (int line = 0; line < ahead.lines; ++line, ahead.next += kLine) __builtin_prefetch(ahead.next, 0, 2);
  if (ahead.next >= ahead.end) ahead.lines = 0;
}

FASTINV_AMX_TARGET void amx_round(const AmxRoundArgs& a) {
  const int whole = a.channels / kAmxDepth * kAmxDepth;
  for (int64_t p = 0; p < a.pixels; ++p) {
    const float* in = a.in + p * a.channels;
    uint16_t* out = a.out + p * a.out_step;
    for (int c = 0; c < whole; c += kAmxDepth) round_depth(in + c, out + c, kAmxDepth);
    if (whole < a.channels) round_depth(in + whole, out + whole, a.channels - whole);
  }
}

void amx_turn(const AmxTurnArgs& a) {
  for (int channel = 0; channel < a.channels; channel += kAmxDepth) {
    const float* in = a.in + channel * a.in_channel;
    const int depth = a.channels - channel < kAmxDepth ? a.channels - channel : kAmxDepth;
    for (int p = a.first; p < a.last; p += kAmxRows) {
      const int pixels = a.last - p < kAmxRows ? a.last - p : kAmxRows;
      amx_fetch(*a.ahead);
      const auto at = [&](int pixel) {
        return a.out + pixel / a.row_pixels * a.out_row + int64_t{pixel % a.row_pixels} * a.out_step + channel;
      };
      if (pixels == kAmxRows && p % a.row_pixels + kAmxRows <= a.row_pixels) {
        turn_depth(in + p, a.in_channel, depth, kAmxRows, at(p), a.out_step);
        continue;
      }
      alignas(64) uint16_t turned[kAmxRows][kAmxDepth];
      turn_depth(in + p, a.in_channel, depth, pixels, turned[0], kAmxDepth);
      for (int i = 0; i < pixels; ++i) memcpy(at(p + i), turned[i], sizeof turned[i]);
    }
  }
}

struct AmxPlace {
  int64_t image;
  int32_t row, column;
};

FASTINV_INLINE AmxPlace amx_place(const AmxArgs& a, int64_t position) {
  const int64_t row = position / a.row_positions;
  return {row / a.image_rows, static_cast<int32_t>(row % a.image_rows),
          static_cast<int32_t>(position % a.row_positions)};
}

// Sums of products of kRows tiles of pixels, which begin at `in`, with kColumns tiles of weights: [row][column].
template <int kRows, int kColumns>
FASTINV_INLINE void amx_sums(Tiles& tiles, const AmxArgs& a, const uint16_t* const* in, const uint16_t* weights,
                             float* sums, AmxAhead& ahead) {
  constexpr int kA = kRows * kColumns, kAs = kRows > 2 ? 2 : kRows, kB = kA + kAs;  // numbers of tiles; 0 on: sums
  static_assert(kB + kColumns <= 8);
  constexpr int64_t kTile = kAmxDepth * kAmxColumns, kLine = 64;
  const int64_t step = a.in_pixel * int64_t{sizeof(uint16_t)};
  tiles.clear<0>();
  if constexpr (kA > 1) tiles.clear<1>();
  if constexpr (kA > 2) tiles.clear<2>(), tiles.clear<3>();
  for (int t = 0; t < a.tap_count; ++t) {
    for (int64_t k = a.taps[t], end = k + a.depth; k < end; k += kAmxDepth, weights += kColumns * kTile) {
      amx_fetch(ahead);
      tiles.load<kB>(weights, kLine);
      tiles.load<kA>(in[0] + k, step);
      tiles.multiply<0, kA, kB>();
      if constexpr (kColumns > 1) {
        tiles.load<kB + 1>(weights + kTile, kLine);
        tiles.multiply<1, kA, kB + 1>();
        if constexpr (kRows > 1) {
          tiles.load<kA + 1>(in[1] + k, step);
          tiles.multiply<2, kA + 1, kB>();
          tiles.multiply<3, kA + 1, kB + 1>();
        }
      } else if constexpr (kRows > 1) {
        tiles.load<kA + 1>(in[1] + k, step);
        tiles.multiply<1, kA + 1, kB>();
        tiles.load<kA>(in[2] + k, step);
        tiles.multiply<2, kA, kB>();
        tiles.load<kA + 1>(in[3] + k, step);
        tiles.multiply<3, kA + 1, kB>();
      }
    }
  }
  constexpr int64_t kRow = kColumns * kAmxColumns, kBlock = kAmxRows * kRow, kStep = kRow * sizeof(float);
  tiles.store<0>(sums, kStep);
  if constexpr (kColumns > 1) {
    tiles.store<1>(sums + kAmxColumns, kStep);
    if constexpr (kRows > 1) {
      tiles.store<2>(sums + kBlock, kStep);
      tiles.store<3>(sums + kBlock + kAmxColumns, kStep);
    }
  } else if constexpr (kRows > 1) {
    tiles.store<1>(sums + kBlock, kStep);
    tiles.store<2>(sums + 2 * kBlock, kStep);
    tiles.store<3>(sums + 3 * kBlock, kStep);
  }
}

// Results of pixels of a row, channel by channel; `sums` has kAmxRows floats for each channel of each stacked row of
// taps, whose rows of pixels are `next_row` floats apart.
static void amx_planar_results(const AmxArgs& a, const AmxPlace& place, const float* sums, int64_t next_row) {
  const int left = a.columns - place.column, pixels = left < kAmxRows ? left : kAmxRows;
  const int64_t at = place.row * a.out_row + place.column;
  for (int c = 0; c < a.out_channels; ++c) {
    float* out = a.out + place.image * a.out_image + c * a.out_channel + at;
    const float* addend = a.addend ? a.addend + place.image * a.addend_image + c * a.out_channel + at : nullptr;
    for (int p = 0; p < pixels; p += kWidth) {
      const int some = pixels - p < kWidth ? pixels - p : kWidth;
      V y = set1(a.bias[c]);
      for (int k = 0; k < a.stacked; ++k) {
        y = add(y, load(sums + k * next_row + (k * a.out_channels + c) * kAmxRows + p));
      }
      if (addend) y = add(y, load_first(addend + p, some));
      store_first(out + p, activate_cheap(y, a.activation.kind), some);
    }
    if (!is_cheap(a.activation.kind)) activate_in_place(out, pixels, a.activation);
  }
}

// Results of so many pixels side by side, of so many channels.
template <int kLanes>
FASTINV_INLINE void amx_results(const AmxArgs& a, const float* sums, int64_t pixels, int channel, int lanes, float* out,
                                const float* addend) {
  constexpr int kVectors = kLanes / kWidth;
  const ActivationKind kind = a.activation.kind;
  for (int64_t p = 0; p < pixels; ++p, sums += kLanes, out += a.out_pixel) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int c = v * kWidth, some = lanes - c;
      if (some <= 0) break;
      const bool whole = some >= kWidth;
      V y = add(load(sums + c), load(a.bias + channel + c));
      if (addend) y = add(y, whole ? load(addend + c) : load_first(addend + c, some));
      y = activate_cheap(y, kind);
      whole ? store(out + c, y) : store_first(out + c, y, some);
    }
    if (addend) addend += a.addend_pixel;
    if (!is_cheap(kind)) activate_in_place(out, lanes, a.activation);
  }
}

// The same of a pair of tiles' channels, rounded; `sums` may change.
FASTINV_AMX_TARGET static void amx_rounded_results(const AmxArgs& a, float* sums, int64_t pixels, int channel,
                                                   uint16_t* out, const float* addend) {
  constexpr int kLanes = kAmxDepth, kVectors = kLanes / kWidth;
  static_assert(kLanes == 2 * kAmxColumns);
  const ActivationKind kind = a.activation.kind;
  const bool cheap = is_cheap(kind);
  V bias[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) bias[v] = load(a.bias + channel + v * kWidth);
  for (int64_t p = 0; p < pixels; ++p) {
    V y[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* sum = sums + p * kLanes + v * kWidth;
      y[v] = add(load(sum), bias[v]);
      if (addend) y[v] = add(y[v], load(addend + p * a.addend_pixel + v * kWidth));
      y[v] = activate_cheap(y[v], kind);
      if (!cheap) store(sum, y[v]);
    }
    if (cheap) store_depth(y, out + p * a.out_pixel);
  }
  if (cheap) return;
  activate_in_place(sums, pixels * kLanes, a.activation);
  for (int64_t p = 0; p < pixels; ++p) round_depth(sums + p * kLanes, out + p * a.out_pixel, kLanes);
}

// The pixels of kRows tiles by the output channels of kColumns.
template <int kRows, int kColumns>
void amx_tiles(Tiles& tiles, const AmxArgs& a, int64_t tile, const uint16_t* weights, int channel, AmxAhead& ahead) {
  constexpr int kLanes = kColumns * kAmxColumns;
  const uint16_t* in[kRows];
  for (int r = 0; r < kRows; ++r) {
    const AmxPlace place = amx_place(a, (tile + r) * kAmxRows);
    in[r] = a.in + place.image * a.in_image + place.row * a.in_row + place.column * a.in_pixel;
  }
  alignas(64) float sums[kRows * kAmxRows][kLanes];
  amx_sums<kRows, kColumns>(tiles, a, in, weights, sums[0], ahead);
  if (kColumns == 1 && a.out_channel > 1) {
    for (int r = 0; r < kRows; ++r) {
      alignas(64) float turned[kAmxColumns * kAmxRows];
      transpose(sums[r * kAmxRows], kAmxColumns, turned, kAmxRows, kAmxRows, kAmxColumns);
      amx_planar_results(a, amx_place(a, (tile + r) * kAmxRows), turned, 0);
    }
    return;
  }
  const int lanes = a.out_channels - channel < kLanes ? a.out_channels - channel : kLanes;
  AmxPlace place = amx_place(a, tile * kAmxRows);
  const int64_t left = a.positions - tile * kAmxRows, end = left < kRows * kAmxRows ? left : kRows * kAmxRows;
  for (int64_t p = 0; p < end;) {  // as far as pixels of one row go
    const int64_t there = place.row < a.rows && place.column < a.columns ? a.columns - place.column : 0;
    const int64_t of_row = a.row_positions - place.column, row_end = p + of_row < end ? p + of_row : end;
    const int64_t pixels = row_end - p < there ? row_end - p : there;
    const int64_t at = place.image * a.out_image + place.row * a.out_row + place.column * a.out_pixel + channel;
    const float* addend = a.addend ? a.addend + place.image * a.addend_image + place.row * a.addend_row +
                                         place.column * a.addend_pixel + channel
                                   : nullptr;
    if (kColumns == 2 && a.rounded) {
      amx_rounded_results(a, sums[p], pixels, channel, a.rounded + at, addend);
    } else {
      amx_results<kLanes>(a, sums[p], pixels, channel, lanes, a.out + at, addend);
    }
    p = row_end;
    place.column = 0;
    if (++place.row == a.image_rows) place.row = 0, ++place.image;
  }
}

template <int kRows, int kColumns>
void amx_columns(Tiles& tiles, const AmxArgs& a, const uint16_t* weights, int channel, AmxAhead& ahead) {
  int64_t tile = a.first;
  for (; tile + kRows <= a.last; tile += kRows) amx_tiles<kRows, kColumns>(tiles, a, tile, weights, channel, ahead);
  for (; tile < a.last; ++tile) amx_tiles<1, kColumns>(tiles, a, tile, weights, channel, ahead);
}

// A row of outputs sums over rows of products, each made once for all rows of taps: one product of tiles for so many.
void amx_stacked(Tiles& tiles, const AmxArgs& a, AmxAhead& ahead) {
  constexpr int kMostRows = 32;  // of products: 32 KB of sums
  alignas(64) float turned[kMostRows][kAmxColumns * kAmxRows];
  const int64_t tiles_a_row = a.row_positions / kAmxRows, last = a.last / tiles_a_row;
  for (int64_t row = a.first / tiles_a_row; row < last;) {
    AmxPlace place = amx_place(a, row * a.row_positions);
    const int64_t fit = kMostRows + 1 - a.stacked, of_image = a.image_rows - place.row;
    const int64_t there = last - row < of_image ? last - row : of_image, rows = there < fit ? there : fit;
    for (place.column = 0; place.column < a.columns; place.column += kAmxRows) {
      const uint16_t* in = a.in + place.image * a.in_image + place.row * a.in_row + place.column * a.in_pixel;
      const int64_t products = rows + a.stacked - 1;
      for (int64_t r = 0; r < products;) {
        constexpr int kRows = 4;
        alignas(64) float sums[kRows][kAmxRows * kAmxColumns];
        const uint16_t* from[kRows];
        for (int64_t i = 0; i < kRows; ++i) from[i] = in + (r + i) * a.in_row;
        const int64_t some = r + kRows <= products ? kRows : 1;
        some > 1 ? amx_sums<kRows, 1>(tiles, a, from, a.weights, sums[0], ahead)
                 : amx_sums<1, 1>(tiles, a, from, a.weights, sums[0], ahead);
        for (int64_t i = 0; i < some; ++i, ++r) {
          amx_fetch(ahead);
          transpose(sums[i], kAmxColumns, turned[r], kAmxRows, kAmxRows, kAmxColumns);
        }
      }
      AmxPlace result = place;
      for (int64_t y = 0; y < rows; ++y, ++result.row) {
        amx_planar_results(a, result, turned[y], sizeof turned[0] / sizeof(float));
      }
    }
    row += rows;
  }
}

void amx(const AmxArgs& a) {
  Tiles tiles;
  tiles.begin();
  const uint16_t* weights = a.weights;
  AmxAhead ahead = *a.ahead;
  if (a.stacked > 1) amx_stacked(tiles, a, ahead);
  for (int channel = 0; channel < a.out_channels && a.stacked == 1;) {
    const bool two = a.out_channels - channel > kAmxColumns;
    two ? amx_columns<2, 2>(tiles, a, weights, channel, ahead) : amx_columns<4, 1>(tiles, a, weights, channel, ahead);
    const int columns = (two ? 2 : 1) * kAmxColumns;
    weights += int64_t{a.tap_count} * a.depth * columns;
    channel += columns;
  }
  tiles.end();
  *a.ahead = ahead;
}
#else
constexpr void (*amx)(const AmxArgs&) = nullptr;
constexpr void (*amx_round)(const AmxRoundArgs&) = nullptr;
constexpr void (*amx_turn)(const AmxTurnArgs&) = nullptr;
#endif
