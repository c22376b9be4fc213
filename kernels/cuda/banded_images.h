// Bands of sixteen images of one channel: row y of each. T[y, i], the band from row y + i − border, is one for all rows
// but those near a border, which have their own. A warp has eight columns of seven rows, a lane their sums and pixels
// as `warp.h` tells: sums[row], image lane / 4 + 8·i, column 2·(lane % 4) + e at 2·i + e.
#pragma once

#include "banded.h"

namespace fastinv {

template <int kTaps>
struct BandedImages {
  static constexpr int kImages = 16, kChannels = 1, kRows = 7, kSums = kRows;

  // Of each row a byte, the number among the row taps in memory of its tap −kTaps; then the kind of columns.
  using Keys = uint64_t;

  FASTINV_BOTH static int plane(const Descent& d) { return d.height * kImages * band::kPitch / 2; }
  FASTINV_BOTH static bool takes(const Descent& d, const BandedForm& form) {
    return d.channels == 1 && d.height <= 4 * kRows && form.taps == kTaps;
  }

  FASTINV_BLOCK static Keys keys(const Descent& d, const BandedForm& form, int thread) {
    const int tile = column_of(thread) / band::kColumns;
    Keys keys = 0;
    if (tile * band::kColumns < d.width) keys = uint64_t(form.kind[tile]) << 8 * kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(thread) + r;
      if (row < d.height) keys |= uint64_t(form.first[row] + kTaps) << 8 * r;
    }
    return keys;
  }

  template <class F>
  FASTINV_BLOCK static void pixels(const Descent& d, int image, int thread, F&& f) {
    uint32_t first[4];  // all images have fewer than 2^31 pixels
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int n = image + image_of(thread, c / 2), column = column_of(thread) + c % 2;
      first[c] = (n < d.images ? n : d.images - 1) * d.height * d.width + (column < d.width ? column : 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(thread) + r, line = row < d.height ? row * d.width : 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        f(4 * r + c, 0, first[c] + line, image + image_of(thread, c / 2),
          row < d.height && column_of(thread) + c % 2 < d.width);
      }
    }
  }

  FASTINV_BLOCK static int pair(const Descent& d, int thread, int number) {
    const int row = row_of(thread) + number / 2, column = column_of(thread);
    if (row >= d.height || column >= d.width) return -1;
    return ((row * kImages + image_of(thread, number % 2)) * band::kPitch + band::kReach + column) / 2;
  }

  template <class Warp, class All>
  FASTINV_BLOCK static void multiply(const Descent& d, const BandedForm& form, const Warp& warp,
                                     const BandMemory& memory, All& all) {
    const int index = warp.index(), tile = index % band::kAcross, top = index / band::kAcross * kRows;
    if (tile * band::kColumns >= d.width) return;
    const int step = in_place(form.kinds * kWarp);
#pragma unroll
    for (int k = 0; k < kRows + kTaps - 1; ++k) {
      const int row = top + k - kTaps / 2;
      if (static_cast<unsigned>(row) >= static_cast<unsigned>(d.height)) continue;
      const auto load = [&](const uint32_t* plane, PerLane<LeftFactor>& to) {
        warp.load(
            [&](int lane) {
              return plane + ((row * kImages + lane % 16) * band::kPitch + tile * band::kColumns + lane / 16 * 8) / 2;
            },
            to);
      };
      PerLane<LeftFactor> high, low;
      load(memory.high, high);
      load(memory.low, low);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int tap = k - r;
        if (tap < 0 || tap >= kTaps || top + r >= d.height) continue;
        PerLane<SplitRight> weights;
        warp.each([&](int lane) {
          const Keys keys = all[warp.thread(lane)].keys;
          const int first = static_cast<int>(keys >> 8 * r & 0xff), kind = static_cast<int>(keys >> 8 * kRows);
          weights(lane) = memory.weights[(first + tap - kTaps) * step + kind * kWarp + lane];
        });
        const auto sums = [&](int lane) -> Sums& { return all[warp.thread(lane)].gradient[r]; };
        multiply_split(warp, sums, high, low, weights);
      }
    }
  }

 private:
  // A thread's first row and column, and its image number i.
  FASTINV_BLOCK static int row_of(int thread) { return thread / kWarp / band::kAcross * kRows; }
  FASTINV_BLOCK static int column_of(int thread) {
    return thread / kWarp % band::kAcross * band::kColumns + thread % 4 * 2;
  }
  FASTINV_BLOCK static int image_of(int thread, int i) { return thread % kWarp / 4 + 8 * i; }
};

}  // namespace fastinv
