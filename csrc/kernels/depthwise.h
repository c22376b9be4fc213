// Depthwise correlation: one filter per channel, channels in the vector.
#pragma once

template <int kPixels>
void depthwise_tile(const DepthwiseArgs& args, const Tile& tile, const float* in, float* out, const float* addend) {
  const Run* first = args.runs + tile.first_run;
  for (int c = 0; c < args.channels; c += kWidth) {
    const int lanes = args.channels - c < kWidth ? args.channels - c : kWidth;
    const V start = args.bias ? load_first(args.bias + c, lanes) : zero();
    V acc[kPixels];
#pragma GCC unroll 6
    for (int p = 0; p < kPixels; ++p) acc[p] = start;
    const Run* run = first;
    for (const Run* end = first + tile.runs; run != end; ++run) {
      const V w = load_first(args.weights + static_cast<int64_t>(run->weight) * args.channels + c, lanes);
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) {
        const float* x = run->offset[p] == kOutside ? args.zeros : in + run->offset[p];
        acc[p] = fma(load_first(x + c, lanes), w, acc[p]);
      }
    }
#pragma GCC unroll 6
    for (int p = 0; p < kPixels; ++p) {
      const int64_t at = tile.out[p] + c;
      const V y = addend ? add(acc[p], load_first(addend + at, lanes)) : acc[p];
      store_first(out + at, activate(y, args.activation), lanes);
    }
  }
}

void depthwise(const DepthwiseArgs& args) {
  using DepthwiseTile = void (*)(const DepthwiseArgs&, const Tile&, const float*, float*, const float*);
  constexpr DepthwiseTile table[] = {depthwise_tile<1>, depthwise_tile<2>, depthwise_tile<3>,
                                     depthwise_tile<4>, depthwise_tile<5>, depthwise_tile<6>};
  for (int64_t r = 0; r < args.row_count; ++r) {
    const TileRow& row = args.rows[r];
    const Tile* tile = args.tiles + row.first_tile;
    for (const Tile* end = tile + row.tiles; tile != end; ++tile) {
      table[tile->pixels - 1](args, *tile, args.in + row.in_base, args.out + row.out_base,
                              args.addend ? args.addend + row.out_base : nullptr);
    }
  }
}
