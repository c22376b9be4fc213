// A small decoder, that of MNIST's ReLU2, in one launch: a transposed convolution from 16 channels of 8×8 pixels to 8
// of 12×12 (5×5), an activation, and one to an image of 28×28 (5×5, stride 2). All is float32, whatever the features
// are.
//
// A block has 8 images in shared memory. A thread has a whole row of outputs of one image, so that all that a row of
// inputs gives to it is there, and no product is of a zero around the image:
//
//   1. Of 4 channels, 48 sums: for every row of inputs that reaches it, 8 inputs and 20 weights, 160 products. Threads
//      of a warp have rows y and 11 − y, which as many rows reach.
//   2. Of the image, 28 sums: 12 inputs and 5 weights, 60 products.
//
// These are 468,000 FLOPs an image, no more than the direct form has: 1,830 cycles of a multiprocessor, 31 µs on an
// H100 for 4,096. Memory takes 7. Two blocks share a multiprocessor, so that one computes while the other reads or
// writes.
#pragma once

#include "block.h"
#include "tail_output.h"

namespace fastinv {

struct SmallTail {
  const void* x;         // [images, 16, 8, 8] of `given`, or [images, 8, 8, 16] if `channels_last`
  const float* weights;  // [small::kWeights], as they lie in shared memory
  void* out;             // [images, 28, 28]
  int32_t* flag;         // [1], set to 1 where x holds NaN or Inf; or null
  int32_t images, channels_last;
  Result given, result;
  float slope;    // of the first layer's activation below 0: 0 for ReLU, 1 for none
  Finish finish;  // of the second layer
  float a, b;     // its parameters
};

namespace small {

constexpr int kImages = 8, kThreads = 256;
constexpr int kInputs = 16, kSide = 8;
constexpr int kBetween = 8, kWide = 12;
constexpr int kTaps = 5;
constexpr int kOut = 28;              // the last column and row are the bias alone
constexpr int kFew = 4;               // channels of a thread
constexpr int kFirst = kTaps * kFew;  // weights of an input channel, a row of taps and a thread's channels
constexpr int kLast = 8;              // of a channel and a row of taps: 5, and 3 that fill up
constexpr int kLastBegin = kInputs * kTaps * (kBetween / kFew) * kFirst;
constexpr int kBiasBegin = kLastBegin + kBetween * kTaps * kLast;
constexpr int kWeights = kBiasBegin + kBetween + 4;
// Floats from image to image: with 4 more than they have, 8 images' fours lie in different banks.
constexpr int kPixels = kInputs * kSide * kSide, kPitch = kPixels + 4;
constexpr int kBetweenPitch = kBetween * kWide * kWide + 4;
constexpr int kFloats = kWeights + kImages * (kPitch + kBetweenPitch);
static_assert(kOut * kOut <= kPixels);  // results take the inputs' place
static_assert(kFloats * sizeof(float) * 2 <= 227 * 1024);

template <int kCount>
FASTINV_BLOCK inline void read(const float* from, float (&to)[kCount]) {
  static_assert(kCount % 4 == 0);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Four four = *reinterpret_cast<const Four*>(from + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[i + k] = four.at[k];
  }
}
template <int kCount>
FASTINV_BLOCK inline void write(const float (&from)[kCount], float* to) {
#pragma unroll
  for (int i = 0; i + 4 <= kCount; i += 4) {
    *reinterpret_cast<Four*>(to + i) = {{from[i], from[i + 1], from[i + 2], from[i + 3]}};
  }
}

// Four features in a row.
template <class Type>
FASTINV_BLOCK inline Four widened_four(Type type, const void* x, int64_t index) {
  const TwoWords both = static_cast<const TwoWords*>(x)[index];
  Four four;
  unpack(type, both.at[0], four.at[0], four.at[1]);
  unpack(type, both.at[1], four.at[2], four.at[3]);
  return four;
}
FASTINV_BLOCK inline Four widened_four(float, const void* x, int64_t index) {
  return static_cast<const Four*>(x)[index];
}

inline int blocks(const SmallTail& p) { return (p.images + kImages - 1) / kImages; }

// What a block does.
template <class Block>
class Worker {
 public:
  FASTINV_BLOCK Worker(const SmallTail& p, Block& block)
      : p_(p),
        block_(block),
        first_(block.index() * kImages),
        there_(p.images - first_ < kImages ? p.images - first_ : kImages),
        weights_(block.shared()),
        inputs_(weights_ + kWeights),
        between_(inputs_ + kImages * kPitch) {}

  FASTINV_BLOCK void run() {
    block_.each([&](int thread) {
      for (int i = thread; i < kWeights / 4; i += kThreads) {
        reinterpret_cast<Four*>(weights_)[i] = reinterpret_cast<const Four*>(p_.weights)[i];
      }
      switch (p_.given) {
        case Result::kBfloat16: bring(thread, Bfloat16{}); break;
        case Result::kFloat16: bring(thread, Float16{}); break;
        default: bring(thread, 0.0f);
      }
    });
    block_.each([&](int thread) { first_layer(thread); });
    block_.each([&](int thread) { last_layer(thread); });
    block_.each([&](int thread) {
      with_result(p_, [&](auto* out, auto both) {
        auto* pairs = reinterpret_cast<decltype(both(0.0f, 0.0f))*>(out) + int64_t{first_} * (kOut * kOut / 2);
        for (int i = thread; i < there_ * (kOut * kOut / 2); i += kThreads) {
          const int image = i / (kOut * kOut / 2), place = i % (kOut * kOut / 2);
          const float* from = inputs_ + image * kPitch + 2 * place;
          pairs[i] = both(from[0], from[1]);
        }
      });
    });
  }

 private:
  template <class Type>
  FASTINV_BLOCK void bring(int thread, Type type) {
    constexpr int kFours = kPixels / 4, kEach = kImages * kFours / kThreads;
    Four fours[kEach];
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int index = k * kThreads + thread;
      fours[k] = {};
      if (index / kFours < there_) fours[k] = widened_four(type, p_.x, int64_t{first_} * kFours + index);
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int index = k * kThreads + thread, image = index / kFours, place = index % kFours * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) finite = finite && fabsf(fours[k].at[i]) < as_float(0x7f800000u);
      float* to = inputs_ + image * kPitch;
      if (!p_.channels_last) {
        *reinterpret_cast<Four*>(to + place) = fours[k];
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[(place + i) % kInputs * (kSide * kSide) + (place + i) / kInputs] = fours[k].at[i];
      }
    }
    if (p_.flag != nullptr && !finite) *p_.flag = 1;
  }

  // out[y][x + u] += Σ_r in[r][x] · w[y − r][u].
  FASTINV_BLOCK void first_layer(int thread) const {
    constexpr int kGroups = kBetween / kFew;
    const int warp = thread / kWarp, image = thread % kImages, group = thread / kImages % kGroups;
    // Warps whose numbers are equal modulo 4 share a scheduler: each has 5 rows of inputs, as 5, 5, 4 + 1 and 3 + 2.
    const int upper = warp < 2 ? 4 + warp : warp < 4 ? 5 - warp : warp - 6;
    if (upper < 0) return;
    const bool lower = thread % kWarp >= kWarp / 2;
    const int y = lower ? kWide - 1 - upper : upper;
    const int top = y < kTaps ? 0 : y - kTaps + 1, bottom = y < kSide ? y : kSide - 1;
    const float* from = inputs_ + image * kPitch + top * kSide;
    const float* weights = weights_ + ((y - top) * kGroups + group) * kFirst;
    const float* bias = weights_ + kBiasBegin + group * kFew;
    float sums[kFew][kWide];
#pragma unroll
    for (int o = 0; o < kFew; ++o) {
#pragma unroll
      for (int x = 0; x < kWide; ++x) sums[o][x] = bias[o];
    }
#pragma unroll 1
    for (int r = 0; r <= bottom - top; ++r, from += kSide, weights -= kGroups * kFirst) {
#pragma unroll 2
      for (int c = 0; c < kInputs; ++c) {
        float in[kSide], w[kFirst];
        read(from + c * (kSide * kSide), in);
        read(weights + c * (kTaps * kGroups * kFirst), w);
#pragma unroll
        for (int o = 0; o < kFew; ++o) {
#pragma unroll
          for (int u = 0; u < kTaps; ++u) {
#pragma unroll
            for (int x = 0; x < kSide; ++x) sums[o][x + u] += in[x] * w[o * kTaps + u];
          }
        }
      }
    }
    const float slope = p_.slope;
#pragma unroll
    for (int o = 0; o < kFew; ++o) {
#pragma unroll
      for (int x = 0; x < kWide; ++x) sums[o][x] = sums[o][x] < 0.0f ? slope * sums[o][x] : sums[o][x];
      write(sums[o], between_ + image * kBetweenPitch + ((group * kFew + o) * kWide + y) * kWide);
    }
  }

  // out[y][2·x + u] += Σ_i in[i][x] · w[y − 2·i][u].
  FASTINV_BLOCK void last_layer(int thread) const {
    const int image = thread % kImages, y = thread / kWarp + thread % kWarp / kImages * (kOut / 4);
    if (thread / kWarp >= kOut / 4) return;
    const int top = y < kTaps ? 0 : (y - kTaps + 2) / 2, bottom = y / 2 < kWide ? y / 2 : kWide - 1;
    const float* from = between_ + image * kBetweenPitch;
    float sums[kOut];
#pragma unroll
    for (int x = 0; x < kOut; ++x) sums[x] = weights_[kBiasBegin + kBetween];
#pragma unroll 1
    for (int i = top; i <= bottom; ++i) {
#pragma unroll 2
      for (int c = 0; c < kBetween; ++c) {
        float in[kWide], w[kLast];
        read(from + (c * kWide + i) * kWide, in);
        read(weights_ + kLastBegin + (c * kTaps + y - 2 * i) * kLast, w);
#pragma unroll
        for (int u = 0; u < kTaps; ++u) {
#pragma unroll
          for (int x = 0; x < kWide; ++x) sums[2 * x + u] += in[x] * w[u];
        }
      }
    }
    fastinv::finish(p_, sums);
    write(sums, inputs_ + image * kPitch + y * kOut);
  }

  const SmallTail& p_;
  Block& block_;
  const int first_, there_;
  float *weights_, *inputs_, *between_;
};

#ifndef __CUDACC__
inline void on_host(const SmallTail& p, bool backward) {
  for (int index = 0; index < blocks(p); ++index) {
    HostBlock block(index, kThreads, kFloats, backward);
    Worker<HostBlock>(p, block).run();
  }
}
#endif

}  // namespace small

// Whether there is a kernel: for these shapes alone.
inline bool fits(const SmallTail&) { return true; }

}  // namespace fastinv
