// What `tail.h` is given, and what becomes of its results.
#pragma once

#include "warpgroup.h"

namespace fastinv {

enum class Result : int32_t { kFloat32, kBfloat16, kFloat16, kUint8 };
enum class Finish : int32_t { kIdentity, kLeakyRelu, kSigmoid, kTanh, kClamp };

struct Tail {
  // Two-byte values: [images, kInputs, kSide, kSide], or [images, kSide, kSide, kInputs] if `channels_last`.
  const void* x;
  const void *first, *last;       // weights, as they lie in shared memory: `kFirstBytes`, `kLastBytes`
  const float *bias, *last_bias;  // [kBetween], [outputs], or null
  void* out;                      // [images, outputs, 2·kSide, 2·kSide], of these strides
  int32_t* flag;                  // [1], set to 1 where x holds NaN or Inf; or null
  int32_t images, outputs, channels_last, float16;
  int32_t out_n, out_c, out_y, out_x;
  Result result;
  float slope;    // of the first layer's activation below 0: 0 for ReLU, 1 for none
  Finish finish;  // of the second layer
  float a, b;     // its parameters
};

namespace tail {

struct alignas(8) Two {
  float at[2];
};

FASTINV_BLOCK inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));  // at most 1: no overflow
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// The second layer's activation, of some values: one branch for all.
template <int kCount>
FASTINV_BLOCK void finish(const Tail& p, float (&x)[kCount]) {
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

FASTINV_BLOCK inline void store(const Tail& p, int64_t at, float x) {
  switch (p.result) {
    case Result::kFloat32: static_cast<float*>(p.out)[at] = x; break;
    case Result::kBfloat16: static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(pack(Bfloat16{}, x, 0.0f)); break;
    case Result::kFloat16: static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(pack(Float16{}, x, 0.0f)); break;
    case Result::kUint8:  // NaN becomes 0
      static_cast<uint8_t*>(p.out)[at] = static_cast<uint8_t>(rintf(255.0f * (x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f)));
  }
}

}  // namespace tail

}  // namespace fastinv
