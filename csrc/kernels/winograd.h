// The transforms of F(4×4, 3×3) and F(2×2, 5×5), channels in the vector; see csrc/winograd.h.
#pragma once

// Bᵀ·d for one column or row d of six.
FASTINV_INLINE void winograd_input_line(const V d[6], V t[6]) {
  const V four = set1(4.0f), five = set1(5.0f), two = set1(2.0f);
  const V even4 = sub(d[4], mul(four, d[2])), odd4 = sub(d[3], mul(four, d[1]));
  const V even1 = sub(d[4], d[2]), odd1 = mul(two, sub(d[3], d[1]));
  t[0] = add(sub(mul(four, d[0]), mul(five, d[2])), d[4]);
  t[1] = add(even4, odd4);
  t[2] = sub(even4, odd4);
  t[3] = add(even1, odd1);
  t[4] = sub(even1, odd1);
  t[5] = add(sub(mul(four, d[1]), mul(five, d[3])), d[5]);
}

// Aᵀ·m for one column or row m of six: four outputs or two.
template <int kOutputs>
FASTINV_INLINE void winograd_output_line(const V m[6], V* y) {
  const V plus12 = add(m[1], m[2]), minus12 = sub(m[1], m[2]);
  const V plus34 = add(m[3], m[4]), minus34 = sub(m[3], m[4]);
  y[0] = add(add(m[0], plus12), plus34);
  y[1] = fma(set1(2.0f), minus34, minus12);
  if constexpr (kOutputs == 4) {
    y[2] = fma(set1(4.0f), plus34, plus12);
    y[3] = fma(set1(8.0f), minus34, minus12);
  }
  y[kOutputs - 1] = add(y[kOutputs - 1], m[5]);
}

FASTINV_INLINE void winograd_input_lanes(const float* const* pixels, int c, int lanes, float* out, int64_t stride) {
  V columns[6][6];  // [column][row of Bᵀ d]
#pragma GCC unroll 6
  for (int v = 0; v < 6; ++v) {
    V d[6];
#pragma GCC unroll 6
    for (int u = 0; u < 6; ++u) d[u] = load_first(pixels[u * 6 + v] + c, lanes);
    winograd_input_line(d, columns[v]);
  }
#pragma GCC unroll 6
  for (int u = 0; u < 6; ++u) {
    V d[6], t[6];
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) d[v] = columns[v][u];
    winograd_input_line(d, t);
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) store_first(out + (u * 6 + v) * stride + c, t[v], lanes);
  }
}

// out[position] = (Bᵀ d B)[position] for the 6×6 pixels d of one tile.
void winograd_input(const float* const* tile, int32_t channels, float* out, int64_t position_stride) {
  const float* pixels[36];  // copies, which no store can change
#pragma GCC unroll 36
  for (int p = 0; p < 36; ++p) pixels[p] = tile[p];
  const int whole = channels / kWidth * kWidth;
  for (int c = 0; c < whole; c += kWidth) winograd_input_lanes(pixels, c, kWidth, out, position_stride);
  if (whole < channels) winograd_input_lanes(pixels, whole, channels - whole, out, position_stride);
}

template <int kOutputs>
FASTINV_INLINE void winograd_output_lanes(const WinogradOutputArgs& a, int c, int lanes) {
  V columns[6][kOutputs];  // [column][row of Aᵀ m]
#pragma GCC unroll 6
  for (int v = 0; v < 6; ++v) {
    V m[6];
#pragma GCC unroll 6
    for (int u = 0; u < 6; ++u) m[u] = load_first(a.products + (u * 6 + v) * a.position_stride + c, lanes);
    winograd_output_line<kOutputs>(m, columns[v]);
  }
  const V bias = load_first(a.bias + c, lanes);
#pragma GCC unroll 4
  for (int u = 0; u < kOutputs; ++u) {
    if (u >= a.rows) break;
    V m[6], y[kOutputs];
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) m[v] = columns[v][u];
    winograd_output_line<kOutputs>(m, y);
#pragma GCC unroll 4
    for (int v = 0; v < kOutputs; ++v) {
      if (v >= a.columns) break;
      const int64_t at = u * a.row_stride + int64_t{v} * a.channels + c;
      V result = add(y[v], bias);
      if (a.addend) result = add(result, load_first(a.addend + at, lanes));
      store_first(a.out + at, activate_cheap(result, a.activation.kind), lanes);
    }
  }
}

template <int kOutputs>
void winograd_output_tile(const WinogradOutputArgs& args) {
  const WinogradOutputArgs a = args;  // a copy, which no store can change
  const int whole = a.channels / kWidth * kWidth;
  for (int c = 0; c < whole; c += kWidth) winograd_output_lanes<kOutputs>(a, c, kWidth);
  if (whole < a.channels) winograd_output_lanes<kOutputs>(a, whole, a.channels - whole);
  if (is_cheap(a.activation.kind)) return;
  for (int u = 0; u < a.rows; ++u) {
    activate_in_place(a.out + u * a.row_stride, int64_t{a.columns} * a.channels, a.activation);
  }
}

// out = activation(bias + Aᵀ m A), the rows × columns pixels of one tile that lie inside.
void winograd_output(const WinogradOutputArgs& args) {
  args.outputs == 4 ? winograd_output_tile<4>(args) : winograd_output_tile<2>(args);
}
