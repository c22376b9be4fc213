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
  const float share = x >= 0.0f ? 1.0f : e;
#ifdef __CUDACC__
  return __fdividef(share, 1.0f + e);  // to 2 ulp, without a branch for denominators unlike these
#else
  return share / (1.0f + e);
#endif
}

// That of `p`, of some values: one branch for all.
template <class Params, int kCount>
FASTINV_BLOCK void finish(const Params& p, float (&x)[kCount]) {
  const float a = p.a, b = p.b;
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = f(x[i]);
  };
  switch (p.finish) {
    case Finish::kIdentity: break;
    case Finish::kLeakyRelu: each([a](float v) { return v < 0.0f ? a * v : v; }); break;
    case Finish::kSigmoid: each([](float v) { return sigmoid(v); }); break;
    case Finish::kTanh: each([](float v) { return tanhf(v); }); break;
    case Finish::kClamp: each([a, b](float v) { return v < a ? a : v > b ? b : v; });
  }
}

}  // namespace fastinv
