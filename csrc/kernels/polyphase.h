// The transforms of F(m, 2) along one axis or two, channels in the vector; see csrc/polyphase.h.
#pragma once

// Bᵀ·d for one line d of m + 1.
template <int kOutputs>
FASTINV_INLINE void polyphase_input_line(const V* d, V* t) {
  if constexpr (kOutputs == 2) {
    t[0] = sub(d[0], d[1]);
    t[1] = d[1];
    t[2] = sub(d[1], d[2]);
  } else {
    constexpr float a = kNearPoint, b = kFarPoint;
    const V odd_a = fma(set1(-b * b), d[1], d[3]), even_a = fma(set1(-b * b), d[0], d[2]);
    const V odd_b = fma(set1(-a * a), d[1], d[3]), even_b = fma(set1(-a * a), d[0], d[2]);
    t[0] = fma(set1(a), even_a, odd_a);
    t[1] = fma(set1(-a), even_a, odd_a);
    t[2] = fma(set1(b), even_b, odd_b);
    t[3] = fma(set1(-b), even_b, odd_b);
    t[4] = fma(set1(-b * b), even_b, fma(set1(-a * a), d[2], d[4]));
  }
}

// Aᵀ·m for one line m of m + 1.
template <int kOutputs>
FASTINV_INLINE void polyphase_output_line(const V* m, V* y) {
  if constexpr (kOutputs == 2) {
    y[0] = add(m[0], m[1]);
    y[1] = sub(m[1], m[2]);
  } else {
    constexpr float a = kNearPoint, b = kFarPoint;
    const V plus_a = add(m[0], m[1]), minus_a = sub(m[0], m[1]), plus_b = add(m[2], m[3]), minus_b = sub(m[2], m[3]);
    y[0] = add(plus_a, plus_b);
    y[1] = fma(set1(b), minus_b, mul(set1(a), minus_a));
    y[2] = fma(set1(b * b), plus_b, mul(set1(a * a), plus_a));
    y[3] = fma(set1(b * b * b), minus_b, fma(set1(a * a * a), minus_a, m[4]));
  }
}

// kRows and kColumns are the inputs of a tile, kRows 1 where only one axis is transformed.
template <int kRows, int kColumns>
FASTINV_INLINE void polyphase_input_lanes(const float* const* pixels, int c, int lanes, float* out, int64_t stride) {
  V rows[kRows][kColumns];
#pragma GCC unroll 5
  for (int u = 0; u < kRows; ++u) {
    V d[kColumns];
#pragma GCC unroll 5
    for (int v = 0; v < kColumns; ++v) d[v] = load_first(pixels[u * kColumns + v] + c, lanes);
    polyphase_input_line<kColumns - 1>(d, rows[u]);
  }
#pragma GCC unroll 5
  for (int v = 0; v < kColumns; ++v) {
    V t[kRows];
    if constexpr (kRows == 1) {
      t[0] = rows[0][v];
    } else {
      V d[kRows];
#pragma GCC unroll 5
      for (int u = 0; u < kRows; ++u) d[u] = rows[u][v];
      polyphase_input_line<kRows - 1>(d, t);
    }
#pragma GCC unroll 5
    for (int u = 0; u < kRows; ++u) store_first(out + (u * kColumns + v) * stride + c, t[u], lanes);
  }
}

template <int kRows, int kColumns>
void polyphase_input_tile(const PolyphaseInputArgs& a) {
  const float* pixels[kRows * kColumns];  // copies, which no store can change
#pragma GCC unroll 25
  for (int p = 0; p < kRows * kColumns; ++p) pixels[p] = a.pixels[p];
  const int channels = a.channels, whole = channels / kWidth * kWidth;
  const int64_t stride = a.position_stride;
  float* out = a.out;
  for (int c = 0; c < whole; c += kWidth) {
    polyphase_input_lanes<kRows, kColumns>(pixels, c, kWidth, out, stride);
  }
  if (whole < channels) polyphase_input_lanes<kRows, kColumns>(pixels, whole, channels - whole, out, stride);
}

template <int kRows, int kColumns>
FASTINV_INLINE void polyphase_output_lanes(const PolyphaseOutputArgs& a, int c, int lanes) {
  constexpr int kOutRows = kRows == 1 ? 1 : kRows - 1, kOutColumns = kColumns - 1;
  V columns[kColumns][kOutRows];
#pragma GCC unroll 5
  for (int v = 0; v < kColumns; ++v) {
    V m[kRows];
#pragma GCC unroll 5
    for (int u = 0; u < kRows; ++u) m[u] = load_first(a.products + (u * kColumns + v) * a.position_stride + c, lanes);
    if constexpr (kRows == 1) {
      columns[v][0] = m[0];
    } else {
      polyphase_output_line<kOutRows>(m, columns[v]);
    }
  }
  const V bias = load_first(a.bias + c, lanes);
#pragma GCC unroll 4
  for (int u = 0; u < kOutRows; ++u) {
    if (u >= a.rows) break;
    V m[kColumns], y[kOutColumns];
#pragma GCC unroll 5
    for (int v = 0; v < kColumns; ++v) m[v] = columns[v][u];
    polyphase_output_line<kOutColumns>(m, y);
#pragma GCC unroll 4
    for (int v = 0; v < kOutColumns; ++v) {
      if (v >= a.columns) break;
      const int64_t at = u * a.row_step + v * a.column_step + c;
      V result = add(y[v], bias);
      if (a.addend) result = add(result, load_first(a.addend + at, lanes));
      store_first(a.out + at, activate_cheap(result, a.activation.kind), lanes);
    }
  }
}

template <int kRows, int kColumns>
void polyphase_output_tile(const PolyphaseOutputArgs& args) {
  const PolyphaseOutputArgs a = args;  // a copy, which no store can change
  const int whole = a.channels / kWidth * kWidth;
  for (int c = 0; c < whole; c += kWidth) polyphase_output_lanes<kRows, kColumns>(a, c, kWidth);
  if (whole < a.channels) polyphase_output_lanes<kRows, kColumns>(a, whole, a.channels - whole);
  if (is_cheap(a.activation.kind)) return;
  for (int u = 0; u < a.rows; ++u) {
    for (int v = 0; v < a.columns; ++v) {
      activate_in_place(a.out + u * a.row_step + v * a.column_step, a.channels, a.activation);
    }
  }
}

void polyphase_input(const PolyphaseInputArgs& a) {
  switch (a.positions) {
    case 3: return polyphase_input_tile<1, 3>(a);
    case 5: return polyphase_input_tile<1, 5>(a);
    case 9: return polyphase_input_tile<3, 3>(a);
    default: return polyphase_input_tile<5, 5>(a);
  }
}

void polyphase_output(const PolyphaseOutputArgs& a) {
  switch (a.positions) {
    case 3: return polyphase_output_tile<1, 3>(a);
    case 5: return polyphase_output_tile<1, 5>(a);
    case 9: return polyphase_output_tile<3, 3>(a);
    default: return polyphase_output_tile<5, 5>(a);
  }
}
