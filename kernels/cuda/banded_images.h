// Bands of sixteen images of one channel: row y of each. T[y, i], the band from row y + i − border, is one for all rows
// but those near a border, which have their own. A warp has eight columns of seven rows, a lane their sums and pixels
// as `warp.h` tells: sums[row], image lane / 4 + 8·i, column 2·(lane % 4) + e at 2·i + e.
#pragma once

#include "banded.h"

namespace fastinv {

template <int kTaps>
struct BandedImages {
  static constexpr int kImages = 16, kChannels = 1, kRows = 7, kSums = kRows, kParked = 4;
  // Rows whose weights may be read together: a branch before each few, as whether there are such rows, keeps a compiler
  // from reading all at once, for which it has no registers. Sums of rows after the last are made, and not looked at.
  static constexpr int kAtOnce = 4;
  static constexpr int kHalf = 4 * kRows * kImages * band::kPitch / 2;

  // Of each row a byte, the number among the row taps in memory of its tap −kTaps; then one, the kind of columns.
  struct Keys {
    uint32_t words[2];
    FASTINV_BLOCK int at(int number) const { return static_cast<int>(words[number / 4] >> 8 * (number % 4) & 0xff); }
    FASTINV_BLOCK Keys in_place() const { return {{fastinv::in_place(words[0]), fastinv::in_place(words[1])}}; }
  };

  FASTINV_BOTH static bool takes(const Descent& d, const BandedForm& form) {
    return d.channels == 1 && d.height <= 4 * kRows && form.taps == kTaps;
  }

  FASTINV_BLOCK static Keys keys(const Descent& d, const BandedForm& form, int thread) {
    uint32_t words[2] = {};
    const auto set = [&](int number, int value) {
      words[number / 4] |= static_cast<uint32_t>(value) << 8 * (number % 4);
    };
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(thread) + r;
      set(r, (row < d.height ? form.first[row] : 0) + kTaps);
    }
    set(kRows, band::kind_of(d, form, thread));
    return Keys{{words[0], words[1]}}.in_place();
  }

  template <class F>
  FASTINV_BLOCK static void pixels(const Descent& d, int image, int thread, F&& f) {
    uint32_t first[4];  // all images have fewer than 2^31 pixels
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int n = image + image_of(thread, c / 2), column = band::column_of(thread) + c % 2;
      first[c] = (n < d.images ? n : d.images - 1) * d.height * d.width + (column < d.width ? column : 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(thread) + r, line = row < d.height ? row * d.width : 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        f(4 * r + c, 0, first[c] + line, image + image_of(thread, c / 2),
          row < d.height && band::column_of(thread) + c % 2 < d.width);
      }
    }
  }

  FASTINV_BLOCK static int pair(const Descent& d, int thread, int number) {
    const int row = row_of(thread) + number / 2, column = band::column_of(thread);
    if (row >= d.height || column >= d.width) return -1;
    // Products of constants apart, so that all of a thread's words are at constant distances from the first.
    return (row_of(thread) * kImages + image_of(thread, 0)) * (band::kPitch / 2) + (band::kReach + column) / 2 +
           (number / 2 * kImages + number % 2 * 8) * (band::kPitch / 2);
  }

  template <class Warp, class All>
  FASTINV_BLOCK static void multiply(const Descent& d, const BandedForm& form, const Warp& warp,
                                     const BandMemory& memory, All& all) {
    const int index = in_place(warp.index()), tile = index % band::kAcross, top = index / band::kAcross * kRows;
    PerLane<Keys> keys;
    PerLane<const SplitRight*> all_weights;  // of the kind of columns, from tap −kTaps of the first row on
    warp.each([&](int lane) {
      keys(lane) = all[warp.thread(lane)].keys.in_place();
      all_weights(lane) = memory.weights + (keys(lane).at(kRows) * form.factors - kTaps) * kWarp + lane;
    });
#pragma unroll
    for (int k = 0; k < kRows + kTaps - 1; ++k) {
      const int row = top + k - kTaps / 2;
      if (static_cast<unsigned>(row) >= static_cast<unsigned>(d.height)) continue;
      const auto load = [&](const uint32_t* plane, PerLane<LeftFactor>& to) {
        warp.load(
            [&](int lane) {
              return plane + row * (kImages * band::kPitch / 2) +
                     (lane % 16 * (band::kPitch / 2) + tile * (band::kColumns / 2) + lane / 16 * 4);
            },
            to);
      };
      PerLane<LeftFactor> high, low;
      load(memory.high, high);
      load(memory.low, low);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int tap = k - r;
        if (tap < 0 || tap >= kTaps || top + r / kAtOnce * kAtOnce >= d.height) continue;
        PerLane<SplitRight> weights;
        warp.each([&](int lane) { weights(lane) = all_weights(lane)[(keys(lane).at(r) + tap) * kWarp]; });
        const auto sums = [&](int lane) -> Sums& { return all[warp.thread(lane)].gradient[r]; };
        multiply_split(warp, sums, high, low, weights);
      }
    }
  }

 private:
  // A thread's first row, and its image number i.
  FASTINV_BLOCK static int row_of(unsigned thread) { return static_cast<int>(thread / kWarp / band::kAcross * kRows); }
  FASTINV_BLOCK static int image_of(unsigned thread, int i) { return static_cast<int>(thread % kWarp / 4) + 8 * i; }
};

}  // namespace fastinv
