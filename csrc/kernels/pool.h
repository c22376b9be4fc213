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
  if (!a.index) {
    for_each_window(a, [&](const Window& w, int64_t out, int c, int lanes) {
      V best = set1(-__builtin_inff());
      for (int u = w.u0; u < w.u1; ++u) {
        for (int v = w.v0; v < w.v1; ++v) best = max(best, load_first(a.in + pixel_at(a, w, u, v) + c, lanes));
      }
      store_first(a.out + out, activate(best, a.activation), lanes);
    });
    return;
  }
  for_each_window(a, [&](const Window& w, int64_t out, int c, int lanes) {
    V best = set1(-__builtin_inff()), index = set1(-1.0f);
    for (int u = w.u0; u < w.u1; ++u) {
      for (int v = w.v0; v < w.v1; ++v) {
        const V x = load_first(a.in + pixel_at(a, w, u, v) + c, lanes);
        const Mask better = less(best, x);
        best = select(better, x, best);
        index = select(better, set1(static_cast<float>(u * a.kernel[1] + v)), index);
      }
    }
    store_first(a.out + out, activate(best, a.activation), lanes);
    store_first(a.index + out, index, lanes);
  });
}

// The gradient goes to the first input of the window that equals the maximum, as in PyTorch.
void max_pool_gradient(const PoolGradientArgs& args) {
  const PoolArgs& a = args.pool;
  bool apart = true, covers = true;  // windows; all inputs
  for (int axis = 0; axis < 2; ++axis) {
    const int in = axis == 0 ? a.in_h : a.in_w, out = axis == 0 ? a.out_h : a.out_w;
    apart = apart && a.dilation[axis] == 1 && a.stride[axis] >= a.kernel[axis];
    covers = covers && a.padding[axis] == 0 && a.stride[axis] == a.kernel[axis] && out * a.stride[axis] == in;
  }
  const bool writes = apart && !args.accumulate;  // each input at most once
  if (!args.accumulate && !(apart && covers)) {
    memset(args.grad_in, 0,
           sizeof(float) * static_cast<size_t>(a.in_h) * static_cast<size_t>(a.in_w) * static_cast<size_t>(a.channels));
  }
  for_each_window(a, [&](const Window& w, int64_t out, int c, int lanes) {
    const V index = load_first(a.index + out, lanes), grad = load_first(args.grad_out + out, lanes);
    for (int u = w.u0; u < w.u1; ++u) {
      for (int v = w.v0; v < w.v1; ++v) {
        float* to = args.grad_in + pixel_at(a, w, u, v) + c;
        const V own = select(equal(index, set1(static_cast<float>(u * a.kernel[1] + v))), grad, zero());
        store_first(to, writes ? own : add(load_first(to, lanes), own), lanes);
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
