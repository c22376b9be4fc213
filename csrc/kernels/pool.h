// Max pooling and its gradient; separable linear resampling (average pools, upsampling), which is its own gradient
// with the matrices transposed. Channels in the vector.
#pragma once

// The kernel positions that fall inside the input: rows y + u·dilation for u0 <= u < u1, columns likewise.
struct Window {
  int y, u0, u1;
  int x, v0, v1;
};

FASTINV_INLINE void clip(const PoolArgs& a, int axis, int size, int position, int* base, int* begin, int* end) {
  *base = position * a.stride[axis] - a.padding[axis];
  *begin = 0;
  while (*begin < a.kernel[axis] && *base + *begin * a.dilation[axis] < 0) ++*begin;
  *end = a.kernel[axis];
  while (*end > *begin && *base + (*end - 1) * a.dilation[axis] >= size) --*end;
}

// Offset of the input pixel at kernel position (u, v) of a window.
FASTINV_INLINE int64_t pixel_at(const PoolArgs& a, const Window& w, int u, int v) {
  return (static_cast<int64_t>(w.y + u * a.dilation[0]) * a.in_w + w.x + v * a.dilation[1]) * a.channels;
}

// Calls body(window, offset of the output, first channel, lanes) for every output pixel and vector of channels.
template <class Body>
FASTINV_INLINE void for_each_window(const PoolArgs& a, Body body) {
  for (int i = 0; i < a.out_h; ++i) {
    Window w;
    clip(a, 0, a.in_h, i, &w.y, &w.u0, &w.u1);
    for (int j = 0; j < a.out_w; ++j) {
      clip(a, 1, a.in_w, j, &w.x, &w.v0, &w.v1);
      const int64_t out = (static_cast<int64_t>(i) * a.out_w + j) * a.channels;
      for (int c = 0; c < a.channels; c += kWidth) {
        body(w, out + c, c, a.channels - c < kWidth ? a.channels - c : kWidth);
      }
    }
  }
}

// out[i, j, c] = max over the window of in
void max_pool(const PoolArgs& a) {
  for_each_window(a, [&](const Window& w, int64_t out, int c, int lanes) {
    V best = set1(-__builtin_inff());
    for (int u = w.u0; u < w.u1; ++u) {
      for (int v = w.v0; v < w.v1; ++v) best = max(best, load_first(a.in + pixel_at(a, w, u, v) + c, lanes));
    }
    store_first(a.out + out, activate(best, a.activation), lanes);
  });
}

// The gradient goes to the first input of the window that equals the maximum, as in PyTorch.
void max_pool_gradient(const PoolGradientArgs& args) {
  const PoolArgs& a = args.pool;
  for_each_window(a, [&](const Window& w, int64_t out, int c, int lanes) {
    const V best = load_first(a.out + out, lanes);
    V left = load_first(args.grad_out + out, lanes);  // what has found no owner yet
    for (int u = w.u0; u < w.u1; ++u) {
      for (int v = w.v0; v < w.v1; ++v) {
        const int64_t in = pixel_at(a, w, u, v) + c;
        const Mask owner = equal(load_first(a.in + in, lanes), best);
        store_first(args.grad_in + in, add(load_first(args.grad_in + in, lanes), select(owner, left, zero())), lanes);
        left = select(owner, zero(), left);
      }
    }
  });
}

void resample(const ResampleArgs& a) {
  for (int i = 0; i < a.out_h; ++i) {
    const int y0 = a.rows.first[i], y1 = a.rows.first[i + 1];
    for (int j = 0; j < a.out_w; ++j) {
      const int x0 = a.columns.first[j], x1 = a.columns.first[j + 1];
      float* out = a.out + (static_cast<int64_t>(i) * a.out_w + j) * a.channels;
      for (int c = 0; c < a.channels; c += kWidth) {
        const int lanes = a.channels - c < kWidth ? a.channels - c : kWidth;
        V acc = a.accumulate ? load_first(out + c, lanes) : zero();
        for (int u = y0; u < y1; ++u) {
          const float* in = a.in + static_cast<int64_t>(a.rows.index[u]) * a.in_w * a.channels + c;
          V line = zero();
          for (int v = x0; v < x1; ++v) {
            const V x = load_first(in + static_cast<int64_t>(a.columns.index[v]) * a.channels, lanes);
            line = fma(x, set1(a.columns.weight[v]), line);
          }
          acc = fma(line, set1(a.rows.weight[u]), acc);
        }
        store_first(out + c, activate(acc, a.activation), lanes);
      }
    }
  }
}
