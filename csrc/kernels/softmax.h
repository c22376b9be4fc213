// Softmax of rows, and the way back.
#pragma once

#include "kernels/vectors.h"

void softmax(const SoftmaxArgs& a) {
  const int64_t whole = a.columns / kWidth * kWidth;
  for (int64_t r = 0; r < a.rows; ++r) {
    const float* in = a.in + r * a.columns;
    float* out = a.out + r * a.columns;
    float most = in[0];
    if (whole > 0) {
      V largest = load(in);
      for (int64_t i = kWidth; i < whole; i += kWidth) largest = max(largest, load(in + i));
      float each[kWidth];
      store(each, largest);
      for (float x : each) most = x > most ? x : most;
    }
    for (int64_t i = whole; i < a.columns; ++i) most = in[i] > most ? in[i] : most;
    V total = zero();
    for_vectors(a.columns, [&](int64_t i, int lanes) {
      const V e = exp(sub(load_first(in + i, lanes), set1(most)));
      total = add(total, lanes == kWidth ? e : first_of(e, lanes));
      store_first(out + i, e, lanes);
    });
    const V inverse = set1(1.0f / sum(total));
    for_vectors(a.columns,
                [&](int64_t i, int lanes) { store_first(out + i, mul(load_first(out + i, lanes), inverse), lanes); });
  }
}

void softmax_gradient(const SoftmaxGradientArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const float *out = a.out + r * a.columns, *grad = a.grad_out + r * a.columns;
    float* into = a.grad_in + r * a.columns;
    V total = zero();
    for_vectors(a.columns, [&](int64_t i, int lanes) {
      total = fma(load_first(out + i, lanes), load_first(grad + i, lanes), total);
    });
    const V mean = set1(sum(total));
    for_vectors(a.columns, [&](int64_t i, int lanes) {
      V d = mul(load_first(out + i, lanes), sub(load_first(grad + i, lanes), mean));
      if (a.accumulate) d = add(d, load_first(into + i, lanes));
      store_first(into + i, d, lanes);
    });
  }
}
