// The gradient of ‖A·z + b − v‖² without A: 2·AᵀA·z + c, for a convolution A of stride 1; see csrc/quadratic.h.
//
// Rows of [H, W, C] are one stretch of floats, the vector runs along it, and what differs from lane to lane (channels,
// columns near the border) is in the weights. A register tile is kRows rows of one vector; a row of z is loaded once
// for each offset, and serves kTaps row taps.
#pragma once

constexpr int kQuadraticRows = FASTINV_MAX_VECTORS > 2 ? kMaxQuadraticRows : 8;

template <int kRows, int kTaps>
void quadratic_tile(const QuadraticArgs& a, int64_t at, int lanes, const float* weights) {
  V acc[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    acc[r] = r < a.rows ? load_first(a.constant + r * a.row + at, lanes) : zero();
  }
  const float* in = a.in + at;
  for (int g = 0; g < a.groups; ++g, in += kTaps * a.in_row) {
    for (int o = 0; o < a.offsets; ++o, weights += kTaps * kWidth) {
      const float* x = in + o;
      V w[kTaps];
#pragma GCC unroll 5
      for (int i = 0; i < kTaps; ++i) w[i] = load(weights + i * kWidth);
#pragma GCC unroll 20
      for (int r = 0; r < kRows + kTaps - 1; ++r, x += a.in_row) {
        const V row = load_once(x);
#pragma GCC unroll 5
        for (int i = 0; i < kTaps; ++i) {
          if (r - i >= 0 && r - i < kRows) acc[r - i] = fma(row, w[i], acc[r - i]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r < a.rows) store_first(a.out + r * a.row + at, acc[r], lanes);
  }
}

// One or two rows with weights of their own: each vector of z that is read serves both. Sums are few, so there are
// several to each row: else every product would wait for the one before.
template <int kRows>
void quadratic_border(const QuadraticArgs& a, int64_t at, int lanes, const float* weights) {
  constexpr int kSums = 4 / kRows;
  V sums[kSums][kRows];
#pragma GCC unroll 4
  for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) sums[s][r] = s ? zero() : load_first(a.constant + r * a.row + at, lanes);
  }
  const auto take = [&](V(&sum)[kRows], const float* x) {
    const V row = load_once(x);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) sum[r] = fma(row, load(weights + r * kWidth), sum[r]);
    weights += kRows * kWidth;
  };
  const float* in = a.in + at;
  for (int g = 0; g < a.groups; ++g, in += a.in_row) {
    int o = 0;
    for (; o + kSums <= a.offsets; o += kSums) {
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) take(sums[s], in + o + s);
    }
    for (; o < a.offsets; ++o) take(sums[0], in + o);
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    V total = sums[0][r];
#pragma GCC unroll 4
    for (int s = 1; s < kSums; ++s) total = add(total, sums[s][r]);
    store_first(a.out + r * a.row + at, total, lanes);
  }
}

using QuadraticTile = void (*)(const QuadraticArgs&, int64_t, int, const float*);

template <int kTaps>
QuadraticTile quadratic_tile_for(int rows) {
  if (rows <= 4) return quadratic_tile<4, kTaps>;
  if constexpr (kQuadraticRows > 8) {
    if (rows > 14) return quadratic_tile<16, kTaps>;
    if (rows > 12) return quadratic_tile<14, kTaps>;
    if (rows > 10) return quadratic_tile<12, kTaps>;
    if (rows > 8) return quadratic_tile<10, kTaps>;
  }
  return quadratic_tile<8, kTaps>;
}

void quadratic(const QuadraticArgs& a) {
  const QuadraticTile tile = a.taps == 0   ? a.rows == 1 ? quadratic_border<1> : quadratic_border<2>
                             : a.taps == 1 ? quadratic_tile_for<1>(a.rows)
                             : a.taps == 3 ? quadratic_tile_for<3>(a.rows)
                                           : quadratic_tile_for<5>(a.rows);
  const int64_t step = int64_t{a.groups} * a.offsets * (a.taps == 0 ? a.rows : a.taps) * kWidth;
  const float* weights = a.weights;
  for (int64_t at = 0; at < a.row; at += kWidth, weights += step) {
    tile(a, at, a.row - at < kWidth ? static_cast<int>(a.row - at) : kWidth, weights);
  }
}
