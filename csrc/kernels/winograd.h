// The transforms of F(4×4, 3×3) and F(2×2, 5×5), channels in the vector; see csrc/winograd.h.
#pragma once

// Fewer channels of a pixel than half a vector holds, or more.
struct FirstLanes : Wide {
  int count;
  explicit FirstLanes(int lanes) : count(lanes) {}
  V get(const float* p) const { return load_first(p, count); }
  void put(float* p, V v) const { store_first(p, v, count); }
};

// Calls body(first channel, lanes) for all channels.
template <class Body>
FASTINV_INLINE void for_each_vector(int channels, Body body) {
  int c = 0;
  for (; c + kWidth <= channels; c += kWidth) body(c, Wide{});
  if (c == channels) return;
  channels - c == kWidth / 2 ? body(c, Narrow{}) : body(c, FirstLanes{channels - c});
}

// Bᵀ·d for one column or row d of six.
template <class L>
FASTINV_INLINE void winograd_input_line(const typename L::Vector d[6], typename L::Vector t[6]) {
  const auto four = L::all(4.0f), five = L::all(5.0f), two = L::all(2.0f);
  const auto even4 = sub(d[4], mul(four, d[2])), odd4 = sub(d[3], mul(four, d[1]));
  const auto even1 = sub(d[4], d[2]), odd1 = mul(two, sub(d[3], d[1]));
  t[0] = add(sub(mul(four, d[0]), mul(five, d[2])), d[4]);
  t[1] = add(even4, odd4);
  t[2] = sub(even4, odd4);
  t[3] = add(even1, odd1);
  t[4] = sub(even1, odd1);
  t[5] = add(sub(mul(four, d[1]), mul(five, d[3])), d[5]);
}

// Aᵀ·m for one column or row m of six: four outputs or two.
template <int kOutputs, class L>
FASTINV_INLINE void winograd_output_line(const typename L::Vector m[6], typename L::Vector* y) {
  const auto plus12 = add(m[1], m[2]), minus12 = sub(m[1], m[2]);
  const auto plus34 = add(m[3], m[4]), minus34 = sub(m[3], m[4]);
  y[0] = add(add(m[0], plus12), plus34);
  y[1] = fma(L::all(2.0f), minus34, minus12);
  if constexpr (kOutputs == 4) {
    y[2] = fma(L::all(4.0f), plus34, plus12);
    y[3] = fma(L::all(8.0f), minus34, minus12);
  }
  y[kOutputs - 1] = add(y[kOutputs - 1], m[5]);
}

template <class L>
FASTINV_INLINE void winograd_input_lanes(const float* const* pixels, int c, L part, float* out, int64_t stride) {
  typename L::Vector columns[6][6];  // [column][row of Bᵀ d]
#pragma GCC unroll 6
  for (int v = 0; v < 6; ++v) {
    typename L::Vector d[6];
#pragma GCC unroll 6
    for (int u = 0; u < 6; ++u) d[u] = part.get(pixels[u * 6 + v] + c);
    winograd_input_line<L>(d, columns[v]);
  }
#pragma GCC unroll 6
  for (int u = 0; u < 6; ++u) {
    typename L::Vector d[6], t[6];
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) d[v] = columns[v][u];
    winograd_input_line<L>(d, t);
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) part.put(out + (u * 6 + v) * stride + c, t[v]);
  }
}

// out[position] = (Bᵀ d B)[position] for the 6×6 pixels d of one tile.
void winograd_input(const float* const* tile, int32_t channels, float* out, int64_t position_stride) {
  const float* pixels[36];  // copies, which no store can change
#pragma GCC unroll 36
  for (int p = 0; p < 36; ++p) pixels[p] = tile[p];
  for_each_vector(channels, [&](int c, auto part) { winograd_input_lanes(pixels, c, part, out, position_stride); });
}

template <int kOutputs, class L>
FASTINV_INLINE void winograd_output_lanes(const WinogradOutputArgs& a, int c, L part) {
  typename L::Vector columns[6][kOutputs];  // [column][row of Aᵀ m]
#pragma GCC unroll 6
  for (int v = 0; v < 6; ++v) {
    typename L::Vector m[6];
#pragma GCC unroll 6
    for (int u = 0; u < 6; ++u) m[u] = part.get(a.products + (u * 6 + v) * a.position_stride + c);
    winograd_output_line<kOutputs, L>(m, columns[v]);
  }
  const typename L::Vector bias = a.abreast ? L::all(a.bias[c / kWidth]) : part.get(a.bias + c);
#pragma GCC unroll 4
  for (int u = 0; u < kOutputs; ++u) {
    if (u >= a.rows) break;
    typename L::Vector m[6], y[kOutputs];
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) m[v] = columns[v][u];
    winograd_output_line<kOutputs, L>(m, y);
#pragma GCC unroll 4
    for (int v = 0; v < kOutputs; ++v) {
      if (v >= a.columns) break;
      const int64_t at = u * a.row_stride + int64_t{v} * a.channels + c;
      typename L::Vector result = add(y[v], bias);
      if (a.addend) result = add(result, part.get(a.addend + at));
      part.put(a.out + at, L::cut(activate_cheap(L::widen(result), a.activation.kind)));
    }
  }
}

template <int kOutputs>
void winograd_output_tile(const WinogradOutputArgs& args) {
  const WinogradOutputArgs a = args;  // a copy, which no store can change
  for_each_vector(a.channels, [&](int c, auto part) { winograd_output_lanes<kOutputs>(a, c, part); });
  if (is_cheap(a.activation.kind)) return;
  for (int u = 0; u < a.rows; ++u) {
    activate_in_place(a.out + u * a.row_stride, int64_t{a.columns} * a.channels, a.activation);
  }
}

// out = activation(bias + Aᵀ m A), the rows × columns pixels of one tile that lie inside.
void winograd_output(const WinogradOutputArgs& args) {
  args.outputs == 4 ? winograd_output_tile<4>(args) : winograd_output_tile<2>(args);
}

// A·y for one column or row y of four or two.
template <int kOutputs, class L>
FASTINV_INLINE void winograd_adjoint_input_line(const typename L::Vector* y, typename L::Vector m[6]) {
  typename L::Vector even = y[0], odd = y[1], even2 = y[0], odd2 = mul(L::all(2.0f), y[1]);
  if constexpr (kOutputs == 4) {
    even = add(even, y[2]);
    odd = add(odd, y[3]);
    even2 = fma(L::all(4.0f), y[2], even2);
    odd2 = fma(L::all(8.0f), y[3], odd2);
  }
  m[0] = y[0];
  m[1] = add(even, odd);
  m[2] = sub(even, odd);
  m[3] = add(even2, odd2);
  m[4] = sub(even2, odd2);
  m[5] = y[kOutputs - 1];
}

// B·t for one column or row t of six.
template <class L>
FASTINV_INLINE void winograd_adjoint_output_line(const typename L::Vector t[6], typename L::Vector d[6]) {
  const auto two = L::all(2.0f), four = L::all(4.0f), five = L::all(5.0f);
  const auto plus12 = add(t[1], t[2]), minus12 = sub(t[1], t[2]);
  const auto plus34 = add(t[3], t[4]), twice34 = mul(two, sub(t[3], t[4]));
  d[0] = mul(four, t[0]);
  d[1] = sub(mul(four, sub(t[5], minus12)), twice34);
  d[2] = sub(sub(mul(L::all(-4.0f), plus12), plus34), mul(five, t[0]));
  d[3] = sub(add(minus12, twice34), mul(five, t[5]));
  d[4] = add(add(t[0], plus12), plus34);
  d[5] = t[5];
}

template <int kOutputs, class L>
FASTINV_INLINE void winograd_adjoint_input_lanes(const float* const* pixels, int c, L part, float* out,
                                                 int64_t stride) {
  typename L::Vector columns[kOutputs][6];  // [column][row of A y]
#pragma GCC unroll 4
  for (int v = 0; v < kOutputs; ++v) {
    typename L::Vector y[kOutputs];
#pragma GCC unroll 4
    for (int u = 0; u < kOutputs; ++u) y[u] = part.get(pixels[u * kOutputs + v] + c);
    winograd_adjoint_input_line<kOutputs, L>(y, columns[v]);
  }
#pragma GCC unroll 6
  for (int u = 0; u < 6; ++u) {
    typename L::Vector y[kOutputs], m[6];
#pragma GCC unroll 4
    for (int v = 0; v < kOutputs; ++v) y[v] = columns[v][u];
    winograd_adjoint_input_line<kOutputs, L>(y, m);
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) part.put(out + (u * 6 + v) * stride + c, m[v]);
  }
}

template <int kOutputs>
void winograd_adjoint_input_tile(const float* const* tile, int32_t channels, float* out, int64_t position_stride) {
  const float* pixels[kOutputs * kOutputs];  // copies, which no store can change
#pragma GCC unroll 16
  for (int p = 0; p < kOutputs * kOutputs; ++p) pixels[p] = tile[p];
  for_each_vector(channels, [&](int c, auto part) {
    winograd_adjoint_input_lanes<kOutputs>(pixels, c, part, out, position_stride);
  });
}

// out[position] = (A y Aᵀ)[position] for the pixels y of one tile.
void winograd_adjoint_input(const float* const* tile, int32_t outputs, int32_t channels, float* out,
                            int64_t position_stride) {
  outputs == 4 ? winograd_adjoint_input_tile<4>(tile, channels, out, position_stride)
               : winograd_adjoint_input_tile<2>(tile, channels, out, position_stride);
}

template <class L>
FASTINV_INLINE void winograd_adjoint_output_lanes(const WinogradAdjointArgs& a, int c, L part) {
  typename L::Vector columns[6][6];  // [column][row of B t]
#pragma GCC unroll 6
  for (int v = 0; v < 6; ++v) {
    typename L::Vector t[6];
#pragma GCC unroll 6
    for (int u = 0; u < 6; ++u) t[u] = part.get(a.products + (u * 6 + v) * a.position_stride + c);
    winograd_adjoint_output_line<L>(t, columns[v]);
  }
#pragma GCC unroll 6
  for (int u = 0; u < 6; ++u) {
    if (u < a.first_row || u >= a.last_row) continue;
    typename L::Vector t[6], d[6];
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) t[v] = columns[v][u];
    winograd_adjoint_output_line<L>(t, d);
#pragma GCC unroll 6
    for (int v = 0; v < 6; ++v) {
      if (v < a.first_column || v >= a.last_column) continue;
      float* to = a.out + u * a.row_stride + int64_t{v} * a.channels + c;
      part.put(to, add(part.get(to), d[v]));
    }
  }
}

// out += B t Bᵀ, as far as it lies inside.
void winograd_adjoint_output(const WinogradAdjointArgs& args) {
  const WinogradAdjointArgs a = args;  // a copy, which no store can change
  for_each_vector(a.channels, [&](int c, auto part) { winograd_adjoint_output_lanes(a, c, part); });
}
