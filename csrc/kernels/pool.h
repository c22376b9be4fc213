// Max pooling and its gradient; separable linear resampling (average pools, upsampling), which is its own gradient
// with the matrices transposed. Channels in the vector, but for windows of 2×2 side by side, which go in [C, H, W] too.
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

// Two rows of a plane for as many windows of 2×2 as a vector has lanes: body(first input, first output, windows).
template <class Body>
FASTINV_INLINE void for_each_pair(const PoolArgs& a, Body body) {
  const int64_t plane = static_cast<int64_t>(a.in_h) * a.in_w;
  int64_t out = 0;
  for (int c = 0; c < a.channels; ++c) {
    for (int i = 0; i < a.out_h; ++i, out += a.out_w) {
      const int64_t in = c * plane + static_cast<int64_t>(2 * i) * a.in_w;
      for (int j = 0; j < a.out_w; j += kWidth) {
        body(in + 2 * j, out + j, a.out_w - j < kWidth ? a.out_w - j : kWidth);
      }
    }
  }
}

// The even and the odd floats of 2 · n at p.
FASTINV_INLINE void load_pairs(const float* p, int n, V* even, V* odd) {
  const int high = 2 * n - kWidth;
  deinterleave(load_first(p, high < 0 ? 2 * n : kWidth), high > 0 ? load_first(p + kWidth, high) : zero(), even, odd);
}

// max_pool of windows of 2×2 side by side on [C, H, W].
void max_pool_pairs(const PoolArgs& a) {
  for_each_pair(a, [&](int64_t in, int64_t out, int n) {
    V x[4];
    load_pairs(a.in + in, n, &x[0], &x[1]);
    load_pairs(a.in + in + a.in_w, n, &x[2], &x[3]);
    const Mask right = less(x[0], x[1]), low_right = less(x[2], x[3]);
    const V high = select(right, x[1], x[0]), low = select(low_right, x[3], x[2]);
    const Mask below = less(high, low);
    const V best = select(below, low, high);
    const V index = select(below, select(low_right, set1(3.0f), set1(2.0f)), select(right, set1(1.0f), zero()));
    store_first(a.out + out, activate(best, a.activation), n);
    if (a.index) store_first(a.index + out, index, n);
  });
}

void max_pool_pairs_gradient(const PoolGradientArgs& args) {
  const PoolArgs& a = args.pool;
  const bool covers = 2 * a.out_h == a.in_h && 2 * a.out_w == a.in_w;
  if (!args.accumulate && !covers) {
    memset(args.grad_in, 0, sizeof(float) * static_cast<size_t>(a.channels) * static_cast<size_t>(a.in_h * a.in_w));
  }
  for_each_pair(a, [&](int64_t in, int64_t out, int n) {
    const V index = load_first(a.index + out, n), grad = load_first(args.grad_out + out, n);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      V low, high;
      interleave(select(equal(index, set1(static_cast<float>(2 * u))), grad, zero()),
                 select(equal(index, set1(static_cast<float>(2 * u + 1))), grad, zero()), &low, &high);
      float* to = args.grad_in + in + u * a.in_w;
      const int first = 2 * n < kWidth ? 2 * n : kWidth, rest = 2 * n - first;
      store_first(to, args.accumulate ? add(load_first(to, first), low) : low, first);
      if (rest == 0) continue;
      store_first(to + kWidth, args.accumulate ? add(load_first(to + kWidth, rest), high) : high, rest);
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
