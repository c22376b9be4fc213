// Dense correlation: convolution, transposed convolution, linear, and the gradients of all three to their input.
//
// Two forms. "broadcast" puts output channels in the vector: for each weight row, kMaxVectors vector loads and one
// broadcast per pixel feed pixels × vectors FMAs, so at 6 × 4 the FMA unit (one 512-bit or two 256-bit FMAs a
// cycle) is the limit and not the load ports. "dot" puts the inner sum in the vector, for the few output channels
// of last layers, where output channels would leave most lanes empty.
#pragma once

FASTINV_INLINE const float* run_start(const CorrelateArgs& args, const float* in, int32_t offset) {
  return offset == kOutside ? args.zeros : in + offset;
}

template <int kVectors, int kPixels>
void correlate_tile(const CorrelateArgs& args, const Tile& tile, const float* in, float* out, const float* addend,
                    const float* weights, const float* bias, int last_lanes) {
  constexpr int kBlock = kVectors * kWidth;
  V acc[kPixels][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const V start = bias ? load(bias + v * kWidth) : zero();
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) acc[p][v] = start;
  }
  const Run* run = args.runs + tile.first_run;
  for (const Run* end = run + tile.runs; run != end; ++run) {
    const float* w = weights + static_cast<int64_t>(run->weight) * kBlock;
    const float* x[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) x[p] = run_start(args, in, run->offset[p]);
    const int64_t length = run->length;
    for (int64_t k = 0; k < length; ++k, w += kBlock) {
      V row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = load(w + v * kWidth);
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        const V pixel = set1(x[p][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[p][v] = fma(pixel, row[v], acc[p][v]);
      }
    }
  }
  const ActivationKind kind = args.activation.kind;
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    float* o = out + tile.out[p];
    const float* a = addend ? addend + tile.out[p] : nullptr;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v, o += kWidth) {
      const bool whole = v + 1 < kVectors || last_lanes == kWidth;
      V y = acc[p][v];
      if (a) y = add(y, whole ? load(a + v * kWidth) : load_first(a + v * kWidth, last_lanes));
      y = activate_cheap(y, kind);
      whole ? store(o, y) : store_first(o, y, last_lanes);
    }
  }
  if (!is_cheap(kind)) {
    for (int p = 0; p < kPixels; ++p) {
      activate_in_place(out + tile.out[p], (kVectors - 1) * kWidth + last_lanes, args.activation);
    }
  }
}

using CorrelateTile = void (*)(const CorrelateArgs&, const Tile&, const float*, float*, const float*, const float*,
                               const float*, int);

template <int kVectors>
CorrelateTile correlate_tile_for(int pixels) {
  constexpr CorrelateTile table[] = {correlate_tile<kVectors, 1>, correlate_tile<kVectors, 2>,
                                     correlate_tile<kVectors, 3>, correlate_tile<kVectors, 4>,
                                     correlate_tile<kVectors, 5>, correlate_tile<kVectors, 6>};
  if constexpr (kVectors == 1) {
    if (pixels > kMaxTilePixels) return pixels == 7 ? correlate_tile<1, 7> : correlate_tile<1, 8>;
  }
  return table[pixels - 1];
}

CorrelateTile correlate_tile_for(int vectors, int pixels) {
  switch (vectors) {
    case 1: return correlate_tile_for<1>(pixels);
    case 2: return correlate_tile_for<2>(pixels);
#if FASTINV_MAX_VECTORS > 2
    case 3: return correlate_tile_for<3>(pixels);
    default: return correlate_tile_for<4>(pixels);
#else
    default: return nullptr;
#endif
  }
}

void correlate(const CorrelateArgs& args) {
  const float* weights = args.weights;
  for (int done = 0; done < args.out_channels; done += kMaxVectors * kWidth) {
    const int left = args.out_channels - done;
    const int vectors = left >= kMaxVectors * kWidth ? kMaxVectors : (left + kWidth - 1) / kWidth;
    const int last_lanes = left >= vectors * kWidth ? kWidth : left - (vectors - 1) * kWidth;
    const int most = vectors == 1 ? kMaxNarrowPixels : kMaxTilePixels;
    CorrelateTile by_pixels[kMaxNarrowPixels + 1];
    for (int p = 1; p <= most; ++p) by_pixels[p] = correlate_tile_for(vectors, p);
    const float* bias = args.bias ? args.bias + done : nullptr;
    for (int64_t r = 0; r < args.row_count; ++r) {
      const TileRow& row = args.rows[r];
      const Tile* tile = args.tiles + row.first_tile;
      for (const Tile* end = tile + row.tiles; tile != end; ++tile) {
        by_pixels[tile->pixels](args, *tile, args.in + row.in_base, args.out + row.out_base + done,
                                args.addend ? args.addend + row.out_base + done : nullptr, weights, bias, last_lanes);
      }
    }
    weights += args.weight_rows * vectors * kWidth;
  }
}

template <int kOutputs, int kPixels>
void correlate_dot_tile(const CorrelateArgs& args, const Tile& tile, const float* in, float* out, const float* addend,
                        const float* weights, const V* bias) {
  constexpr int kSums = kPixels * kOutputs, kVectors = (kSums + kWidth - 1) / kWidth;
  V acc[kVectors * kWidth];  // [pixel][output]
#pragma GCC unroll 32
  for (int i = 0; i < kVectors * kWidth; ++i) acc[i] = zero();
  const Run* run = args.runs + tile.first_run;
  for (const Run* end = run + tile.runs; run != end; ++run) {
    const float* w = weights + run->weight;
    const float* x[kPixels];
#pragma GCC unroll 6
    for (int p = 0; p < kPixels; ++p) x[p] = run_start(args, in, run->offset[p]);
    const int64_t length = run->length;
    int64_t k = 0;
    for (; k + kWidth <= length; k += kWidth) {
      V row[kOutputs];
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) row[o] = load(w + o * args.weight_rows + k);
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) {
        const V pixels = load(x[p] + k);
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) acc[p * kOutputs + o] = fma(pixels, row[o], acc[p * kOutputs + o]);
      }
    }
    if (k < length) {
      const int n = static_cast<int>(length - k);
      V row[kOutputs];
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) row[o] = load_first(w + o * args.weight_rows + k, n);
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) {
        const V pixels = load_first(x[p] + k, n);
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) acc[p * kOutputs + o] = fma(pixels, row[o], acc[p * kOutputs + o]);
      }
    }
  }
  // Pixels side by side leave their results side by side; those of a strided phase do not.
  const bool together =
      tile.out[kPixels - 1] - tile.out[0] == (kPixels - 1) * kOutputs && args.out_channels == kOutputs;
  float before[kVectors * kWidth], after[kVectors * kWidth];
  if (addend && !together) {
#pragma GCC unroll 6
    for (int p = 0; p < kPixels; ++p) {
      for (int o = 0; o < kOutputs; ++o) before[p * kOutputs + o] = addend[tile.out[p] + o];
    }
  }
  const float* added = together ? addend + tile.out[0] : before;
  float* result = together ? out + tile.out[0] : after;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int lanes = kSums - v * kWidth < kWidth ? kSums - v * kWidth : kWidth;
    V y = add(sum_each(acc + v * kWidth), bias[v]);
    if (addend) y = add(y, load_first(added + v * kWidth, lanes));
    store_first(result + v * kWidth, activate_cheap(y, args.activation.kind), lanes);
  }
  if (!is_cheap(args.activation.kind)) activate_in_place(result, kSums, args.activation);
  if (together) return;
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) out[tile.out[p] + o] = after[p * kOutputs + o];
  }
}

using DotTile = void (*)(const CorrelateArgs&, const Tile&, const float*, float*, const float*, const float*, const V*);

template <int kOutputs>
DotTile correlate_dot_tile_for(int pixels) {
  constexpr DotTile table[] = {correlate_dot_tile<kOutputs, 1>, correlate_dot_tile<kOutputs, 2>,
                               correlate_dot_tile<kOutputs, 3>, correlate_dot_tile<kOutputs, 4>,
                               correlate_dot_tile<kOutputs, 5>, correlate_dot_tile<kOutputs, 6>};
  return table[pixels - 1];
}

void correlate_dot(const CorrelateArgs& args) {
  for (int done = 0; done < args.out_channels; done += kMaxDotOutputs) {
    const int left = args.out_channels - done;
    DotTile by_pixels[kMaxTilePixels + 1];
    for (int p = 1; p <= kMaxTilePixels; ++p) {
      by_pixels[p] = left == 1   ? correlate_dot_tile_for<1>(p)
                     : left == 2 ? correlate_dot_tile_for<2>(p)
                     : left == 3 ? correlate_dot_tile_for<3>(p)
                                 : correlate_dot_tile_for<4>(p);
    }
    const float* weights = args.weights + done * args.weight_rows;
    const int outputs = left < kMaxDotOutputs ? left : kMaxDotOutputs;
    float repeated[kMaxTilePixels * kMaxDotOutputs + kWidth] = {};  // for each pixel of a tile
    for (int i = 0; args.bias && i < kMaxTilePixels * outputs; ++i) repeated[i] = args.bias[done + i % outputs];
    V bias[kMaxTilePixels * kMaxDotOutputs / kWidth + 1];
    for (int v = 0; v < kMaxTilePixels * outputs; v += kWidth) bias[v / kWidth] = load(repeated + v);
    for (int64_t r = 0; r < args.row_count; ++r) {
      const TileRow& row = args.rows[r];
      const Tile* tile = args.tiles + row.first_tile;
      for (const Tile* end = tile + row.tiles; tile != end; ++tile) {
        by_pixels[tile->pixels](args, *tile, args.in + row.in_base, args.out + row.out_base + done,
                                args.addend ? args.addend + row.out_base + done : nullptr, weights, bias);
      }
    }
  }
}

// Images abreast, one in each lane: each product of the broadcast form, in the same order, for all of them at once. No
// lane is lost to output channels that are not there, and padding costs nothing.
constexpr int kAbreastOutputs = FASTINV_MAX_VECTORS > 2 ? 4 : 2;

template <int kPixels, int kOutputs>
void correlate_abreast_tile(const CorrelateArgs& args, const Tile& tile, int first, const float* in, float* out,
                            const float* weights, int64_t weight_row, const float* bias) {
  V acc[kPixels][kOutputs];
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
    const V start = bias ? set1(bias[o]) : zero();
#pragma GCC unroll 6
    for (int p = 0; p < kPixels; ++p) acc[p][o] = start;
  }
  const Run* run = args.runs + tile.first_run;
  for (const Run* end = run + tile.runs; run != end; ++run) {
    const float* w = weights + run->weight * weight_row;
    const int32_t* offset = run->offset + first;
    const float* x[kPixels];
    bool inside = true;
#pragma GCC unroll 6
    for (int p = 0; p < kPixels; ++p) {
      inside = inside && offset[p] != kOutside;
      x[p] = in + int64_t{offset[p]} * kWidth;
    }
    for (int64_t k = 0; k < run->length; ++k, w += weight_row) {
      V weight[kOutputs];
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) weight[o] = set1(w[o]);
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) {
        if (!inside && offset[p] == kOutside) continue;
        const V pixel = load(x[p] + k * kWidth);
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) acc[p][o] = fma(pixel, weight[o], acc[p][o]);
      }
    }
  }
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
    float* to = out + int64_t{tile.out[first + p]} * kWidth;
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) store(to + o * kWidth, activate_cheap(acc[p][o], args.activation.kind));
    if (!is_cheap(args.activation.kind)) activate_in_place(to, kOutputs * kWidth, args.activation);
  }
}

using AbreastTile = void (*)(const CorrelateArgs&, const Tile&, int, const float*, float*, const float*, int64_t,
                             const float*);

template <int kOutputs>
AbreastTile correlate_abreast_tile_for(int pixels) {
  constexpr AbreastTile table[] = {correlate_abreast_tile<1, kOutputs>, correlate_abreast_tile<2, kOutputs>,
                                   correlate_abreast_tile<3, kOutputs>, correlate_abreast_tile<4, kOutputs>,
                                   correlate_abreast_tile<5, kOutputs>, correlate_abreast_tile<6, kOutputs>};
  return table[pixels - 1];
}

void correlate_abreast(const CorrelateArgs& args) {
  const int padded = (args.out_channels + kWidth - 1) / kWidth * kWidth;
  for (int done = 0; done < args.out_channels;) {
    const int left = args.out_channels - done, outputs = left >= kAbreastOutputs ? kAbreastOutputs : 1;
    // Weights lie in blocks of channels.
    const int first = done / (kMaxVectors * kWidth) * (kMaxVectors * kWidth);
    const int span = padded - first < kMaxVectors * kWidth ? padded - first : kMaxVectors * kWidth;
    const float* weights = args.weights + args.weight_rows * first + (done - first);
    for (int64_t r = 0; r < args.row_count; ++r) {
      const TileRow& row = args.rows[r];
      const Tile* tile = args.tiles + row.first_tile;
      for (const Tile* end = tile + row.tiles; tile != end; ++tile) {
        const int parts = tile->pixels > kMaxTilePixels ? 2 : 1;
        for (int part = 0; part < parts; ++part) {
          const int first = tile->pixels * part / parts, pixels = tile->pixels * (part + 1) / parts - first;
          const AbreastTile run =
              outputs > 1 ? correlate_abreast_tile_for<kAbreastOutputs>(pixels) : correlate_abreast_tile_for<1>(pixels);
          run(args, *tile, first, args.in + row.in_base * kWidth, args.out + (row.out_base + done) * kWidth, weights,
              span, args.bias ? args.bias + done : nullptr);
        }
      }
    }
    done += outputs;
  }
}

// The same of the dot form: a vector of sums for each of its lanes.
void correlate_abreast_dot_pixel(const CorrelateArgs& args, const Tile& tile, int p, const float* in, float* out,
                                 const float* weights, float bias) {
  V acc[kWidth];
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) acc[l] = zero();
  const Run* run = args.runs + tile.first_run;
  for (const Run* end = run + tile.runs; run != end; ++run) {
    if (run->offset[p] == kOutside) continue;
    const float* w = weights + run->weight;
    const float* x = in + int64_t{run->offset[p]} * kWidth;
    const int64_t length = run->length;
    int64_t k = 0;
    for (; k + kWidth <= length; k += kWidth) {
#pragma GCC unroll 16
      for (int l = 0; l < kWidth; ++l) acc[l] = fma(load(x + (k + l) * kWidth), set1(w[k + l]), acc[l]);
    }
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) {
      if (k + l < length) acc[l] = fma(load(x + (k + l) * kWidth), set1(w[k + l]), acc[l]);
    }
  }
  store(out, activate(add(sum_as_lanes(acc), set1(bias)), args.activation));
}

void correlate_abreast_dot(const CorrelateArgs& args) {
  for (int64_t r = 0; r < args.row_count; ++r) {
    const TileRow& row = args.rows[r];
    const Tile* tile = args.tiles + row.first_tile;
    for (const Tile* end = tile + row.tiles; tile != end; ++tile) {
      for (int p = 0; p < tile->pixels; ++p) {
        for (int o = 0; o < args.out_channels; ++o) {
          correlate_abreast_dot_pixel(args, *tile, p, args.in + row.in_base * kWidth,
                                      args.out + (row.out_base + tile->out[p] + o) * kWidth,
                                      args.weights + o * args.weight_rows, args.bias ? args.bias[o] : 0.0f);
        }
      }
    }
  }
}
