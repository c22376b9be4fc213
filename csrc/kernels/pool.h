// Max pooling and its gradient; separable linear resampling (average pools, upsampling), which is its own gradient
// with the matrices transposed. Channels in the vector.
#pragma once

struct Window {
  int y0, y1, x0, x1;  // kernel positions that fall inside the input
};

FASTINV_INLINE void clip(const PoolArgs& a, int axis, int size, int position, int* begin, int* end, int* base) {
  *base = position * a.stride[axis] - a.padding[axis];
  *begin = 0;
  while (*begin < a.kernel[axis] && *base + *begin * a.dilation[axis] < 0) ++*begin;
  *end = a.kernel[axis];
  while (*end > *begin && *base + (*end - 1) * a.dilation[axis] >= size) --*end;
}

// out[i, j, c] = max over the window of in
void max_pool(const PoolArgs& a) {
  for (int i = 0; i < a.out_h; ++i) {
    int y0, y1, y;
    clip(a, 0, a.in_h, i, &y0, &y1, &y);
    for (int j = 0; j < a.out_w; ++j) {
      int x0, x1, x;
      clip(a, 1, a.in_w, j, &x0, &x1, &x);
      float* out = a.out + (static_cast<int64_t>(i) * a.out_w + j) * a.channels;
      for (int c = 0; c < a.channels; c += kWidth) {
        const int lanes = a.channels - c < kWidth ? a.channels - c : kWidth;
        V best = set1(-__builtin_inff());
        for (int u = y0; u < y1; ++u) {
          const float* in = a.in + static_cast<int64_t>(y + u * a.dilation[0]) * a.in_w * a.channels + c;
          for (int v = x0; v < x1; ++v) {
            best = max(best, load_first(in + static_cast<int64_t>(x + v * a.dilation[1]) * a.channels, lanes));
          }
        }
        store_first(out + c, activate(best, a.activation), lanes);
      }
    }
  }
}

// The gradient goes to the first input of the window that equals the maximum, as in PyTorch.
void max_pool_gradient(const PoolGradientArgs& args) {
  const PoolArgs& a = args.pool;
  for (int i = 0; i < a.out_h; ++i) {
    int y0, y1, y;
    clip(a, 0, a.in_h, i, &y0, &y1, &y);
    for (int j = 0; j < a.out_w; ++j) {
      int x0, x1, x;
      clip(a, 1, a.in_w, j, &x0, &x1, &x);
      const int64_t at_out = (static_cast<int64_t>(i) * a.out_w + j) * a.channels;
      for (int c = 0; c < a.channels; c += kWidth) {
        const int lanes = a.channels - c < kWidth ? a.channels - c : kWidth;
        const V best = load_first(a.out + at_out + c, lanes);
        V left = load_first(args.grad_out + at_out + c, lanes);  // what has found no owner yet
        for (int u = y0; u < y1; ++u) {
          for (int v = x0; v < x1; ++v) {
            const int64_t at_in =
                (static_cast<int64_t>(y + u * a.dilation[0]) * a.in_w + x + v * a.dilation[1]) * a.channels + c;
            const Mask owner = equal(load_first(a.in + at_in, lanes), best);
            const V grad = add(load_first(args.grad_in + at_in, lanes), select(owner, left, zero()));
            store_first(args.grad_in + at_in, grad, lanes);
            left = select(owner, zero(), left);
          }
        }
      }
    }
  }
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
