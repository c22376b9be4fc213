// What `tail.h` and `wide_tail.h` are given, and what becomes of their results.
#pragma once

#include "finish.h"
#include "warpgroup.h"

namespace fastinv {

enum class Result : int32_t { kFloat32, kBfloat16, kFloat16, kUint8 };
struct Tail {
  // Two-byte values: [images, inputs, height, width], or [images, height, width, inputs] if `channels_last`.
  const void* x;
  const void *first, *last;       // weights, as they lie in shared memory
  const float *bias, *last_bias;  // [kBetween], [outputs], or null
  void* out;                      // [images, outputs, 2·height, 2·width], of these strides
  int32_t* flag;                  // [1], set to 1 where x holds NaN or Inf; or null
  int32_t images, height, width, inputs, outputs, channels_last, float16;
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
