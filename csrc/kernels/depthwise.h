// Depthwise correlation: one filter per channel, channels in the vector, neighbouring pixels of a row in registers.
//
// Taps side by side lie in registers, too, and each input is loaded once for all the pixels that read it: a row of 3
// taps over 6 pixels takes 11 loads for 18 products, one of 7 taps 19 for 42. Loads, two a cycle at best and fewer
// from L2, would be the limit otherwise.
#pragma once

// Adds the products of a run of kTaps taps in every row of taps, of pixels kStep columns apart. kInside says that all
// columns they read are there.
template <int kPixels, int kStep, int kTaps, bool kWhole, bool kInside>
FASTINV_INLINE void depthwise_products(V (&acc)[kPixels], const DepthwiseArgs& a, const DepthwiseRun& run, int c,
                                       Lanes lanes) {
  const int64_t step = a.column_step, channels = a.channels;
  const uint32_t there = run.there;
  const DepthwiseTapRow* row = a.tap_rows;
  for (const DepthwiseTapRow* end = row + a.tap_row_count; row != end; ++row) {
    const float *in = a.in + row->in + run.column + c, *weights = a.weights + row->weight + run.weight + c;
    V w[kTaps];
#pragma GCC unroll 7
    for (int k = 0; k < kTaps; ++k) {
      w[k] = kWhole ? load_once(weights + k * channels) : load_lanes(weights + k * channels, lanes);
    }
#pragma GCC unroll 20
    for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j) {
      if (kTaps < kStep && j % kStep >= kTaps) continue;  // nothing reads it
      if (!kInside && !(there & 1u << j)) continue;
      const V x = kWhole ? load_once(in + j * step) : load_lanes(in + j * step, lanes);
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) {
        const int k = j - p * kStep;
        if (k >= 0 && k < kTaps) acc[p] = fma(x, w[k], acc[p]);
      }
    }
  }
}

template <int kPixels, int kStep, int kTaps, bool kWhole>
FASTINV_INLINE void depthwise_run(V (&acc)[kPixels], const DepthwiseArgs& a, const DepthwiseRun& run, int c,
                                  Lanes lanes) {
  constexpr uint32_t kAll = (1u << ((kPixels - 1) * kStep + kTaps)) - 1;
  if (kWhole && run.there == kAll) {
    depthwise_products<kPixels, kStep, kTaps, kWhole, true>(acc, a, run, c, lanes);
  } else {
    depthwise_products<kPixels, kStep, kTaps, kWhole, false>(acc, a, run, c, lanes);
  }
}

template <int kPixels, int kStep, bool kWhole>
FASTINV_INLINE void depthwise_channels(const DepthwiseArgs& a, const DepthwiseTile& tile, int c, int count) {
  const Lanes lanes = lanes_between(0, count);
  const V start = a.bias ? load_first(a.bias + c, count) : zero();
  V acc[kPixels];
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) acc[p] = start;
  const DepthwiseRun* run = a.runs + tile.first_run;
  for (const DepthwiseRun* end = run + tile.runs; run != end; ++run) {
    switch (run->taps) {
      case 1: depthwise_run<kPixels, kStep, 1, kWhole>(acc, a, *run, c, lanes); break;
      case 2: depthwise_run<kPixels, kStep, 2, kWhole>(acc, a, *run, c, lanes); break;
      case 3: depthwise_run<kPixels, kStep, 3, kWhole>(acc, a, *run, c, lanes); break;
      case 5: depthwise_run<kPixels, kStep, 5, kWhole>(acc, a, *run, c, lanes); break;
      default: depthwise_run<kPixels, kStep, 7, kWhole>(acc, a, *run, c, lanes);
    }
  }
  float* out = a.out + tile.out + c;
  const float* addend = a.addend ? a.addend + tile.out + c : nullptr;
  const int64_t step = a.out_step;
  const ActivationKind kind = a.activation.kind;
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
    V y = acc[p];
    if (addend) y = add(y, kWhole ? load(addend + p * step) : load_first(addend + p * step, count));
    y = activate_cheap(y, kind);
    kWhole ? store(out + p * step, y) : store_first(out + p * step, y, count);
  }
}

template <int kPixels, int kStep>
void depthwise_tile(const DepthwiseArgs& a, const DepthwiseTile& tile) {
  int c = 0;
  for (; c + kWidth <= a.channels; c += kWidth) depthwise_channels<kPixels, kStep, true>(a, tile, c, kWidth);
  if (c < a.channels) depthwise_channels<kPixels, kStep, false>(a, tile, c, a.channels - c);
}

void depthwise(const DepthwiseArgs& a) {
  using Kernel = void (*)(const DepthwiseArgs&, const DepthwiseTile&);
  constexpr Kernel table[2][kMaxTilePixels] = {{depthwise_tile<1, 1>, depthwise_tile<2, 1>, depthwise_tile<3, 1>,
                                                depthwise_tile<4, 1>, depthwise_tile<5, 1>, depthwise_tile<6, 1>},
                                               {depthwise_tile<1, 2>, depthwise_tile<2, 2>, depthwise_tile<3, 2>,
                                                depthwise_tile<4, 2>, depthwise_tile<5, 2>, depthwise_tile<6, 2>}};
  const DepthwiseTile* tile = a.tiles;
  for (const DepthwiseTile* end = tile + a.tile_count; tile != end; ++tile) {
    table[a.pixel_step - 1][tile->pixels - 1](a, *tile);
  }
  if (!is_cheap(a.activation.kind)) activate_in_place(a.out, a.row_size, a.activation);
}
