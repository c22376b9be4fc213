// Elementwise kernels: sums and products with broadcasting, per-channel affine maps, index gathers.
#pragma once

// Calls line(offset_a, offset_b, offset_out) for every line along the last axis.
template <class Args, class Line>
FASTINV_INLINE void for_each_line(const Args& a, Line line) {
  int64_t position[kMaxRank] = {};
  int64_t at_a = 0, at_b = 0, at_out = 0;
  const int last = a.rank - 1;
  for (;;) {
    line(at_a, at_b, at_out);
    at_out += a.size[last];
    int axis = last - 1;
    for (; axis >= 0; --axis) {
      at_a += a.stride_a[axis];
      at_b += a.stride_b[axis];
      if (++position[axis] < a.size[axis]) break;
      at_a -= a.stride_a[axis] * a.size[axis];
      at_b -= a.stride_b[axis] * a.size[axis];
      position[axis] = 0;
    }
    if (axis < 0) return;
  }
}

FASTINV_INLINE V load_or_spread(const float* p, int64_t i, int64_t stride, int lanes) {
  return stride ? load_first(p + i, lanes) : set1(*p);
}

void binary(const BinaryArgs& args) {
  const int last = args.rank - 1;
  const int64_t size = args.size[last], step_a = args.stride_a[last], step_b = args.stride_b[last];
  for_each_line(args, [&](int64_t at_a, int64_t at_b, int64_t at_out) {
    for (int64_t i = 0; i < size; i += kWidth) {
      const int lanes = size - i < kWidth ? static_cast<int>(size - i) : kWidth;
      const V a = load_or_spread(args.a + at_a, i, step_a, lanes);
      const V b = load_or_spread(args.b + at_b, i, step_b, lanes);
      const V y = args.kind == BinaryKind::kAdd ? add(a, b) : mul(a, b);
      store_first(args.out + at_out + i, activate(y, args.activation), lanes);
    }
  });
}

void binary_gradient(const BinaryGradientArgs& args) {
  const int last = args.rank - 1;
  const int64_t size = args.size[last], step_a = args.stride_a[last], step_b = args.stride_b[last];
  for_each_line(args, [&](int64_t at_a, int64_t at_b, int64_t at_out) {
    V total = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
      const int lanes = size - i < kWidth ? static_cast<int>(size - i) : kWidth;
      V g = load_first(args.grad_out + at_out + i, lanes);
      if (args.kind == BinaryKind::kMul) g = mul(g, load_or_spread(args.b + at_b, i, step_b, lanes));
      if (step_a) {
        float* grad = args.grad_a + at_a + i;
        store_first(grad, add(load_first(grad, lanes), g), lanes);
      } else {
        total = add(total, g);  // lanes past the end are zero
      }
    }
    if (!step_a) args.grad_a[at_a] += sum(total);
  });
}

void affine(const AffineArgs& args) {
  for (int64_t o = 0; o < args.outer; ++o) {
    const float* in = args.in + o * args.inner;
    float* out = args.out + o * args.inner;
    for (int64_t i = 0; i < args.inner; i += kWidth) {
      const int lanes = args.inner - i < kWidth ? static_cast<int>(args.inner - i) : kWidth;
      const V shift = args.shift ? load_first(args.shift + i, lanes) : zero();
      V y = fma(load_first(in + i, lanes), load_first(args.scale + i, lanes), shift);
      if (args.accumulate) y = add(y, load_first(out + i, lanes));
      store_first(out + i, activate(y, args.activation), lanes);
    }
  }
}

void add(const float* in, float* out, int64_t size) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, add(load(out + i), load(in + i)));
  for (; i < size; ++i) out[i] += in[i];
}

void gather(const float* in, const int32_t* index, float* out, int64_t size, bool accumulate) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const V x = gather(in, index + i);
    store(out + i, accumulate ? add(load(out + i), x) : x);
  }
  for (; i < size; ++i) out[i] = accumulate ? out[i] + in[index[i]] : in[index[i]];
}
