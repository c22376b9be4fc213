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

template <class T>
struct alignas(2 * sizeof(T)) Both {
  T at[2];
};

FASTINV_BLOCK inline uint8_t as_byte(float x) {  // NaN becomes 0
  return static_cast<uint8_t>(rintf(255.0f * (x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f)));
}

// put(out, both): of the type that is asked for, results and what makes two of them.
template <class Params, class F>
FASTINV_BLOCK void with_result(const Params& p, F&& put) {
  const auto of_halves = [](auto type) {
    return [type](float low, float high) {
      const uint32_t word = pack(type, low, high);
      return Both<uint16_t>{{static_cast<uint16_t>(word), static_cast<uint16_t>(word >> 16)}};
    };
  };
  switch (p.result) {
    case Result::kFloat32:
      put(static_cast<float*>(p.out), [](float low, float high) { return Both<float>{{low, high}}; });
      break;
    case Result::kBfloat16: put(static_cast<uint16_t*>(p.out), of_halves(Bfloat16{})); break;
    case Result::kFloat16: put(static_cast<uint16_t*>(p.out), of_halves(Float16{})); break;
    case Result::kUint8:
      put(static_cast<uint8_t*>(p.out),
          [](float low, float high) { return Both<uint8_t>{{as_byte(low), as_byte(high)}}; });
  }
}

}  // namespace fastinv
