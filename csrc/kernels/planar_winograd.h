// F(4, 3) along the rows of [C, H, W], pixels of a row in the vector; see csrc/planar_winograd.h.
//
// A register tile is kPositions transformed rows of kColumns vectors for kOutputs channels: each weight is fetched once
// for kColumns products, each vector of inputs once for kOutputs. With fewer of either, loads would be the limit.
#pragma once

#include "kernels/winograd.h"

constexpr int kPlanarWinogradPositions[] = {0, 6, FASTINV_MAX_VECTORS > 2 ? 6 : 3, FASTINV_MAX_VECTORS > 2 ? 3 : 2,
                                            FASTINV_MAX_VECTORS > 2 ? 3 : 1};

// Bᵀ·d of one vector of the six rows that the tile reads; rows outside the image are zeros.
template <bool kInside, bool kWhole>
FASTINV_INLINE void planar_winograd_vector(const PlanarWinogradArgs& a, const float* in, int lanes, float* out) {
  V d[6];
#pragma GCC unroll 6
  for (int u = 0; u < 6; ++u) {
    const bool inside = kInside || (a.in_row + u >= 0 && a.in_row + u < a.in_h);
    const float* row = in + int64_t{u} * a.in_w;
    d[u] = !inside ? zero() : kWhole ? load(row) : load_first(row, lanes);
  }
  const V two = set1(2.0f), four = set1(4.0f), minus_four = set1(-4.0f), minus_five = set1(-5.0f);
  const V even = fma(minus_four, d[2], d[4]), odd = fma(minus_four, d[1], d[3]);
  const V even_far = sub(d[4], d[2]), odd_far = mul(two, sub(d[3], d[1]));
  store(out, fma(four, d[0], fma(minus_five, d[2], d[4])));
  store(out + a.pitch, add(even, odd));
  store(out + 2 * a.pitch, sub(even, odd));
  store(out + 3 * a.pitch, add(even_far, odd_far));
  store(out + 4 * a.pitch, sub(even_far, odd_far));
  store(out + 5 * a.pitch, fma(four, d[1], fma(minus_five, d[3], d[5])));
}

// The same of the channels of a chunk.
template <bool kInside>
void planar_winograd_input(const PlanarWinogradArgs& a, const float* in, int channels) {
  const int64_t plane = int64_t{a.in_h} * a.in_w;
  const float* next = a.next;
  float* out = a.transformed + a.margin;
  for (int c = 0; c < channels; ++c, in += plane, out += 6 * a.pitch) {
    // Planes lie too far apart for the processor to see the pattern.
    for (const float* end = next + a.next_step; next < end; next += 16) __builtin_prefetch(next, 0, 2);
    int x = 0;
    for (; x + kWidth <= a.in_w; x += kWidth) planar_winograd_vector<kInside, true>(a, in + x, kWidth, out + x);
    if (x < a.in_w) planar_winograd_vector<kInside, false>(a, in + x, a.in_w - x, out + x);
  }
}

// Adds the products of a chunk's channels to those before.
template <int kOutputs, int kPositions, int kColumns>
void planar_winograd_tile(const PlanarWinogradArgs& a, const float* in, const float* w, int channels, bool first,
                          float* products) {
  V acc[kPositions][kOutputs][kColumns];
  const auto at = [&](int u, int o, int v) { return products + (u * kOutputs + o) * a.products_row + v * kWidth; };
#pragma GCC unroll 6
  for (int u = 0; u < kPositions; ++u) {
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kColumns; ++v) acc[u][o][v] = first ? zero() : load(at(u, o, v));
    }
  }
  const Lanes all = lanes_between(0, static_cast<int>(a.products_row));  // as far as GCC can tell, not all
  for (int c = 0; c < channels; ++c, in += 6 * a.pitch) {
    const float* x = in;
#pragma GCC unroll 1
    for (int k = 0; k < a.taps_x; ++k, ++x, w += kPositions * kOutputs) {
#pragma GCC unroll 6
      for (int u = 0; u < kPositions; ++u) {
        V row[kColumns];
#pragma GCC unroll 2
        for (int v = 0; v < kColumns; ++v) {
          const float* p = x + u * a.pitch + v * kWidth;
          // GCC would read a plain operand anew for every product: three times as many loads, which cross lines.
          row[v] = kFreeMasks ? load_lanes(p, all) : load(p);
        }
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) {
          const V weight = set1(w[u * kOutputs + o]);
#pragma GCC unroll 2
          for (int v = 0; v < kColumns; ++v) acc[u][o][v] = fma(row[v], weight, acc[u][o][v]);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int u = 0; u < kPositions; ++u) {
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kColumns; ++v) store(at(u, o, v), acc[u][o][v]);
    }
  }
}

// The products of a chunk for kOutputs channels; `weights` of its first channel.
template <int kOutputs>
void planar_winograd_products(const PlanarWinogradArgs& a, const float* weights, int channels, bool first,
                              float* products) {
  constexpr int kPositions = kPlanarWinogradPositions[kOutputs];
  const int64_t step = int64_t{a.in_channels} * a.taps_x * kPositions * kOutputs;  // from pass to pass
  for (int x = 0; x < a.out_w; x += 2 * kWidth) {
    const float* in = a.transformed + a.margin + a.shift_x + x;
    const float* w = weights;
    for (int u = 0; u < 6; u += kPositions, w += step, in += kPositions * a.pitch) {
      float* to = products + u * kOutputs * a.products_row + x;
      if (x + kWidth < a.out_w) {
        planar_winograd_tile<kOutputs, kPositions, 2>(a, in, w, channels, first, to);
      } else {
        planar_winograd_tile<kOutputs, kPositions, 1>(a, in, w, channels, first, to);
      }
    }
  }
}

// Aᵀ·m, the rows of one output channel that are there.
void planar_winograd_output(const PlanarWinogradArgs& a, const float* products, int64_t position, float bias,
                            float* out, const float* addend) {
  const ActivationKind kind = a.activation.kind;
  for (int x = 0; x < a.out_w; x += kWidth) {
    const int left = a.out_w - x, lanes = left < kWidth ? left : kWidth;
    V m[6], y[4];
#pragma GCC unroll 6
    for (int u = 0; u < 6; ++u) m[u] = load(products + u * position + x);
    winograd_output_line<4, Wide>(m, y);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (r >= a.rows) break;
      const int64_t at = int64_t{r} * a.out_w + x;
      V result = add(y[r], set1(bias));
      if (addend) result = add(result, load_first(addend + at, lanes));
      store_first(out + at, activate_cheap(result, kind), lanes);
    }
  }
  if (!is_cheap(kind)) activate_in_place(out, int64_t{a.rows} * a.out_w, a.activation);
}

void planar_winograd(const PlanarWinogradArgs& args) {
  PlanarWinogradArgs a = args;
  const int64_t in_plane = int64_t{a.in_h} * a.in_w, out_plane = int64_t{a.out_h} * a.out_w;
  const bool inside = a.in_row >= 0 && a.in_row + 6 <= a.in_h;
  for (int done = 0; done < a.in_channels; done += a.chunk) {
    const int channels = a.in_channels - done < a.chunk ? a.in_channels - done : a.chunk;
    inside ? planar_winograd_input<true>(a, a.in + done * in_plane, channels)
           : planar_winograd_input<false>(a, a.in + done * in_plane, channels);
    if (a.next) a.next += int64_t{channels} * a.next_step;
    const float* weights = a.weights;
    for (int o = 0; o < a.out_channels; o += a.block) {
      const int outputs = a.out_channels - o < a.block ? a.out_channels - o : a.block;
      const float* w = weights + int64_t{done} * a.taps_x * kPlanarWinogradPositions[outputs] * outputs;
      float* products = a.products + 6 * o * a.products_row;
      switch (outputs) {
        case 1: planar_winograd_products<1>(a, w, channels, done == 0, products); break;
        case 2: planar_winograd_products<2>(a, w, channels, done == 0, products); break;
        case 3: planar_winograd_products<3>(a, w, channels, done == 0, products); break;
        default: planar_winograd_products<4>(a, w, channels, done == 0, products); break;
      }
      weights += int64_t{6} * a.in_channels * a.taps_x * outputs;
    }
  }
  for (int o = 0; o < a.out_channels; ++o) {
    const int first = o / a.block * a.block;
    const int outputs = a.out_channels - first < a.block ? a.out_channels - first : a.block;
    planar_winograd_output(a, a.products + (6 * first + o - first) * a.products_row, outputs * a.products_row,
                           a.bias[o], a.out + o * out_plane, a.addend ? a.addend + o * out_plane : nullptr);
  }
}
