// A 3×3 convolution of 64 channels to three or fewer, as CIFAR-10's conv11 decoder, of features in the order in which
// users hold them, channel after channel.
//
// Every input is read once: for all nine taps and all outputs together it is multiplied where it lies, and what becomes
// of it is added up in shared memory. A block takes image after image:
//
//   1. A warp has 32 pixels of all channels in registers, as right factors; the next 32 are on their way meanwhile. A
//      lane brings four pixels of each of its channels: the j-th of all lanes are a factor's eight columns, so that
//      what one lane has of it is what it has brought. The left factor's rows are outputs · taps, 27 of 32.
//   2. Each product goes to a plane of its own, [output, tap][pixel].
//   3. A thread has a pixel of the image: nine numbers of nine planes, each from where its tap reads.
//
// An image of 32×32 pixels is 128 KB, which memory brings a multiprocessor of an H200 in 3.6 µs. It begins 25,000
// instructions of warps meanwhile, of which this takes 16,000; what is done in shared memory takes 1.6 µs. Two blocks
// share a multiprocessor.
#pragma once

#include "block.h"
#include "tail_output.h"

namespace fastinv {

struct PlanarLayer {
  const void* x;                                          // two-byte values [images, planar::kInputs, height, width]
  const LeftFactor* weights;                              // [planar::kSteps, 2, kWarp]
  const float* bias;                                      // [outputs], or null
  void* out;                                              // [images, outputs, height, width], of these strides
  int32_t* flag;                                          // [1], set to 1 where x holds NaN or Inf; or null
  int32_t images, height, width, outputs, float16, room;  // room: bytes of shared memory that a block can have
  int32_t out_n, out_c, out_y, out_x;
  Result result;
  Finish finish;
  float a, b;  // its parameters
};

namespace planar {

constexpr int kInputs = 64, kTaps = 9, kMostOutputs = 3;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kSteps = kInputs / 16;     // along the channels
constexpr int kFew = 4;                  // pixels of a lane, and channels of a lane and step
constexpr int kTile = kWarp / 4 * kFew;  // pixels of a warp
constexpr int kRows = 32;                // of the left factor
constexpr int kChecked = kRows - 1;      // one that is 0: of what is finite it makes 0
constexpr int kWeightFloats = kSteps * 2 * kWarp * 4;
constexpr int kBiasFloats = 4;
static_assert(kMostOutputs * kTaps <= kChecked && kMostOutputs <= kBiasFloats);

FASTINV_BOTH inline int pixels(const PlanarLayer& p) { return p.height * p.width; }
FASTINV_BOTH inline int tiles(const PlanarLayer& p) { return (pixels(p) + kTile - 1) / kTile; }
// Where a plane has a 0, which taps outside the image read.
FASTINV_BOTH inline int outside(const PlanarLayer& p) { return tiles(p) * kTile; }
// Floats from plane to plane: with 4 more than tiles fill, what two groups of lanes write lies in different banks.
FASTINV_BOTH inline int pitch(const PlanarLayer& p) { return outside(p) + 4; }
inline int floats(const PlanarLayer& p) { return kWeightFloats + kBiasFloats + kTaps * p.outputs * pitch(p); }
// Of a multiprocessor that has a kilobyte more than a block can have, and takes one for each of them.
inline int blocks_together(const PlanarLayer& p) { return 2 * (4 * floats(p) + 1024) <= p.room + 1024 ? 2 : 1; }

// What a block does.
template <class Type, class Block>
class Worker {
 public:
  FASTINV_BLOCK Worker(const PlanarLayer& p, Block& block, int blocks)
      : p_(p),
        block_(block),
        blocks_(blocks),
        weights_(reinterpret_cast<LeftFactor*>(block.shared())),
        bias_(block.shared() + kWeightFloats),
        planes_(bias_ + kBiasFloats),
        all_(block) {}

  FASTINV_BLOCK void run() {
    block_.each([&](int thread) {
      for (int i = thread; i < kSteps * 2 * kWarp; i += kThreads) weights_[i] = p_.weights[i];
      if (thread < p_.outputs) bias_[thread] = p_.bias != nullptr ? p_.bias[thread] : 0.0f;
      if (thread < kTaps * p_.outputs) planes_[thread * pitch(p_) + outside(p_)] = 0.0f;
      fetch(thread, block_.index(), thread / kWarp);
    });
#pragma unroll 1
    for (int n = block_.index(); n < p_.images; n += blocks_) {
      block_.each_warp([&](const auto& warp) {
#pragma unroll 1
        for (int tile = warp.index(); tile < tiles(p_); tile += kWarps) multiply(warp, n, tile);
      });
      block_.each([&](int thread) {
        for (int pixel = thread; pixel < pixels(p_); pixel += kThreads) add_up(n, pixel);
      });
    }
  }

 private:
  struct Own {
    TwoWords next[kSteps][kFew];  // four pixels of each channel
  };

  // A thread's pixels of a tile; 0 where there are none.
  FASTINV_BLOCK void fetch(int thread, int n, int tile) {
    const int lane = thread % kWarp, pixel = tile * kTile + lane / 4 * kFew, channel = lane % 4 * kFew;
    const int size = in_place(pixels(p_));  // of a channel: else it is computed once more for each load
    const bool there = n < p_.images && pixel < size;
    const auto* from = static_cast<const uint16_t*>(p_.x) + (int64_t{n} * kInputs + channel) * size + pixel;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        TwoWords& four = all_[thread].next[s][i];
        four = {};
        if (there) four = *reinterpret_cast<const TwoWords*>(from);
        from += (i + 1 < kFew ? 1 : 16 - i) * size;
      }
    }
  }

  template <class Warp>
  FASTINV_BLOCK void multiply(const Warp& warp, int n, int tile) {
    PerLane<RightFactor> x[kSteps][kFew];
    PerLane<Sums> sums[2][kFew];
    const bool ends = tile + kWarps >= tiles(p_);
    warp.each([&](int lane) {
      const int thread = warp.thread(lane);
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const TwoWords(&four)[kFew] = all_[thread].next[s];
          const auto both = [&](int i) { return halves(four[i].at[j / 2], four[i + 1].at[j / 2], j % 2); };
          x[s][j](lane) = {{both(0), both(2)}};
          x[s][j](lane).make_here();
        }
        sums[0][j](lane) = sums[1][j](lane) = {};
      }
      fetch(thread, ends ? n + blocks_ : n, ends ? warp.index() : tile + kWarps);
    });
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PerLane<LeftFactor> w;
        warp.each([&](int lane) { w(lane) = weights_[(s * 2 + half) * kWarp + lane]; });
#pragma unroll
        for (int j = 0; j < kFew; ++j) warp.multiply(Type{}, sums[half][j], w, x[s][j]);
      }
    }
    warp.each([&](int lane) {
      float* place = planes_ + tile * kTile + lane % 4 * (2 * kFew);
      float checked = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * i + lane / 4;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Four four;
#pragma unroll
          for (int j = 0; j < kFew; ++j) four.at[j] = sums[i / 2][j](lane).at[i % 2 * 2 + e];
          if (row < kTaps * p_.outputs) *reinterpret_cast<Four*>(place + row * pitch(p_) + e * kFew) = four;
#pragma unroll
          for (int j = 0; j < kFew && i == kChecked / 8; ++j) checked += four.at[j];
        }
      }
      // Each is 0 or NaN.
      if (p_.flag != nullptr && lane / 4 == kChecked % 8 && checked != 0.0f) *p_.flag = 1;
    });
  }

  FASTINV_BLOCK void add_up(int n, int pixel) const {
    const int y = pixel / p_.width, x = pixel % p_.width;
    int from[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int down = tap / 3 - 1, right = tap % 3 - 1;
      const bool inside = static_cast<unsigned>(y + down) < static_cast<unsigned>(p_.height) &&
                          static_cast<unsigned>(x + right) < static_cast<unsigned>(p_.width);
      from[tap] = tap * pitch(p_) + (inside ? pixel + down * p_.width + right : outside(p_));
    }
    float sums[kMostOutputs];
    const float* planes = planes_;
#pragma unroll
    for (int o = 0; o < kMostOutputs; ++o) {
      sums[o] = 0.0f;
      if (o >= p_.outputs) continue;
      sums[o] = bias_[o];
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) sums[o] += planes[from[tap]];
      planes += kTaps * pitch(p_);
    }
    fastinv::finish(p_, sums);
    const int64_t place = int64_t{n} * p_.out_n + int64_t{y} * p_.out_y + int64_t{x} * p_.out_x;
    with_result(p_, [&](auto* out, auto both_of) {
#pragma unroll
      for (int o = 0; o < kMostOutputs; ++o) {
        if (o < p_.outputs) out[place + int64_t{o} * p_.out_c] = both_of(sums[o], 0.0f).at[0];
      }
    });
  }

  const PlanarLayer& p_;
  Block& block_;
  const int blocks_;
  LeftFactor* weights_;
  float *bias_, *planes_;
  typename Block::template PerThread<Own> all_;
};

#ifndef __CUDACC__
inline void on_host(const PlanarLayer& p, bool backward, int blocks = 2) {
  for (int index = 0; index < blocks; ++index) {
    HostBlock block(index, kThreads, floats(p), backward);
    if (p.float16) {
      Worker<Float16, HostBlock>(p, block, blocks).run();
    } else {
      Worker<Bfloat16, HostBlock>(p, block, blocks).run();
    }
  }
}
#endif

}  // namespace planar

// Whether there is a kernel for these shapes.
inline bool fits(const PlanarLayer& p) {
  const int64_t pixels = int64_t{p.height} * p.width;
  return p.height > 0 && p.width > 0 && p.outputs > 0 && p.outputs <= planar::kMostOutputs &&
         pixels % planar::kFew == 0 && pixels < 1 << 16 && 4 * planar::floats(p) <= p.room;
}

}  // namespace fastinv
