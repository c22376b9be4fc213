// The activations that a layer of two-byte values may end with.
#pragma once

#include "halves.h"

#ifndef __CUDACC__
#include <cmath>
#endif

namespace fastinv {

enum class Finish : int32_t { kIdentity, kLeakyRelu, kSigmoid, kTanh, kClamp };

FASTINV_BLOCK inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));  // at most 1: no overflow
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// That of `p`, of some values: one branch for all.
template <class Params, int kCount>
FASTINV_BLOCK void finish(const Params& p, float (&x)[kCount]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = f(x[i]);
  };
  switch (p.finish) {
    case Finish::kIdentity: break;
    case Finish::kLeakyRelu: each([&](float v) { return v < 0.0f ? p.a * v : v; }); break;
    case Finish::kSigmoid: each([](float v) { return sigmoid(v); }); break;
    case Finish::kTanh: each([](float v) { return tanhf(v); }); break;
    case Finish::kClamp: each([&](float v) { return v < p.a ? p.a : v > p.b ? p.b : v; });
  }
}

}  // namespace fastinv
