// Products of matrices that are computed, not packed: c = a · b.
#pragma once

template <int kRows, int kVectors>
void matmul_tile(const MatmulArgs& m, const float* a, const float* b, float* c, int last_lanes) {
  const auto lanes = [last_lanes](int v) { return v == kVectors - 1 ? last_lanes : kWidth; };
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = m.accumulate ? load_first(c + r * m.c_row + v * kWidth, lanes(v)) : zero();
    }
  }
  for (int64_t k = 0; k < m.depth; ++k, a += m.a_step, b += m.b_row) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load_first(b + v * kWidth, lanes(v));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V x = set1(a[r * m.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_first(c + r * m.c_row + v * kWidth, acc[r][v], lanes(v));
  }
}

template <int kVectors>
FASTINV_INLINE void matmul_columns(const MatmulArgs& m, int64_t column, int last_lanes) {
  const float *a = m.a, *b = m.b + column;
  float* c = m.c + column;
  int64_t row = 0;
  for (; row + 6 <= m.rows; row += 6) {
    matmul_tile<6, kVectors>(m, a + row * m.a_row, b, c + row * m.c_row, last_lanes);
  }
  for (; row + 2 <= m.rows; row += 2) {
    matmul_tile<2, kVectors>(m, a + row * m.a_row, b, c + row * m.c_row, last_lanes);
  }
  if (row < m.rows) matmul_tile<1, kVectors>(m, a + row * m.a_row, b, c + row * m.c_row, last_lanes);
}

void matmul(const MatmulArgs& m) {
  constexpr int kBlock = kMaxVectors * kWidth;
  int64_t column = 0;
  for (; column + kBlock <= m.columns; column += kBlock) matmul_columns<kMaxVectors>(m, column, kWidth);
  const int left = static_cast<int>(m.columns - column), last = left % kWidth == 0 ? kWidth : left % kWidth;
  switch ((left + kWidth - 1) / kWidth) {
    case 1: return matmul_columns<1>(m, column, last);
    case 2: return matmul_columns<2>(m, column, last);
    case 3: return matmul_columns<3>(m, column, last);
    case 4: return matmul_columns<4>(m, column, last);
  }
}
