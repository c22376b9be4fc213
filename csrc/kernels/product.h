// The products in the middle of a Winograd form: many small matrices, one for each of its positions.
//
// As the broadcast form of correlate.h, without what only convolutions need: a tile of a 36-position layer may be as
// short as 16 in channels, and what a call does before and after them counted for half of it.
#pragma once

constexpr int kLineVectors = kWidth < 16 ? 16 / kWidth : 1;  // of a cache line
// By vectors of output channels. One row of vectors waits for its last sum four cycles; eight hide that where two
// vectors are summed a cycle.
constexpr int kProductRows[] = {0, 8, 6, 6, 6};

template <class L, int kVectors, int kRows, bool kFetch>
void product_tile(const float* in, float* out, const float* weights, const ProductArgs& a, int last_lanes) {
  constexpr int kBlock = kVectors * kWidth;
  const int64_t length = a.in_channels;
  typename L::Vector acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = L::zeros();
  }
  const float* w = weights;
  for (int64_t k = 0; k < length; ++k, w += kBlock) {
    typename L::Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = L::get(w + v * kWidth);
    if constexpr (kFetch) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += kLineVectors) __builtin_prefetch(w + length * kBlock + v * kWidth, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename L::Vector x = L::all(in[r * length + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, out += a.out_channels) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const bool whole = v + 1 < kVectors || last_lanes == L::kLanes;
      whole ? L::put(out + v * kWidth, acc[r][v]) : L::put_first(out + v * kWidth, acc[r][v], last_lanes);
    }
  }
}

using ProductTile = void (*)(const float*, float*, const float*, const ProductArgs&, int);

template <class L, int kVectors, bool kFetch = false>
ProductTile product_tile_for(int rows) {
  switch (rows) {
    case 1: return product_tile<L, kVectors, 1, kFetch>;
    case 2: return product_tile<L, kVectors, 2, kFetch>;
    case 3: return product_tile<L, kVectors, 3, kFetch>;
    case 4: return product_tile<L, kVectors, 4, kFetch>;
    case 5: return product_tile<L, kVectors, 5, kFetch>;
    case 6: return product_tile<L, kVectors, 6, kFetch>;
  }
  if constexpr (kProductRows[kVectors] > 6) {
    return rows == 7 ? product_tile<L, kVectors, 7, kFetch> : product_tile<L, kVectors, 8, kFetch>;
  }
  return nullptr;
}

ProductTile product_tile_for(int vectors, int last_lanes, int rows) {
  switch (vectors) {
    case 1:
      if (kFastHalves && last_lanes <= Narrow::kLanes) return product_tile_for<Narrow, 1>(rows);
      return product_tile_for<Wide, 1>(rows);
    case kMaxVectors: return product_tile_for<Wide, kMaxVectors, true>(rows);
#if FASTINV_MAX_VECTORS > 2
    case 2: return product_tile_for<Wide, 2>(rows);
    case 3: return product_tile_for<Wide, 3>(rows);
#endif
    default: return nullptr;
  }
}

void product(const ProductArgs& a) {
  constexpr int kBlock = kMaxVectors * kWidth;
  const float* weights = a.weights;
  for (int k = 0; k < a.matrices; ++k) {
    for (int done = 0; done < a.out_channels; done += kBlock) {
      const int left = a.out_channels - done, vectors = left >= kBlock ? kMaxVectors : (left + kWidth - 1) / kWidth;
      const int last_lanes = left >= vectors * kWidth ? kWidth : left - (vectors - 1) * kWidth;
      // Tiles of about the same size.
      const int most = kProductRows[vectors], tiles = (a.rows + most - 1) / most;
      const int fewer = a.rows / tiles, larger = a.rows % tiles;  // the first ones have a row more
      const ProductTile small = product_tile_for(vectors, last_lanes, fewer);
      const ProductTile large = larger > 0 ? product_tile_for(vectors, last_lanes, fewer + 1) : nullptr;
      const float* in = a.in + k * a.in_step;
      float* out = a.out + k * a.out_step + done;
      for (int t = 0; t < tiles; ++t) {
        const int rows = fewer + (t < larger ? 1 : 0);
        (t < larger ? large : small)(in, out, weights, a, last_lanes);
        in += int64_t{rows} * a.in_channels;
        out += int64_t{rows} * a.out_channels;
      }
      weights += int64_t{a.in_channels} * vectors * kWidth;
    }
  }
}
