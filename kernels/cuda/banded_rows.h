// Bands of sixteen rows of an image, for each pair of channels. All rows have the same bands; what the first and the
// last have less, as one that a convolution's results beyond them would see, is one band more, from the row itself.
// A warp has eight columns of sixteen rows, of all channels of two images; a lane of sums[image · kChannels + channel]
// row lane / 4 + 8·i, column 2·(lane % 4) + e at 2·i + e.
#pragma once

#include "banded.h"

namespace fastinv {

template <int kChannels_, int kTaps>
struct BandedRows {
  static constexpr int kImages = 4, kChannels = kChannels_, kTogether = 2, kSums = kTogether * kChannels;
  static constexpr int kParked = 0;
  static constexpr int kRows = 16, kDown = 2, kBorder = kTaps / 2;
  static constexpr int kPlane = (kDown * kRows + 2 * kBorder) * band::kPitch / 2;  // words of a channel
  static constexpr int kHalf = kImages * kChannels * kPlane, kPairs = kChannels * kChannels;

  using Keys = int;  // the kind of columns

  FASTINV_BOTH static bool takes(const Descent& d, const BandedForm& form) {
    return d.channels == kChannels && d.height <= kDown * kRows && form.taps == kTaps;
  }

  FASTINV_BLOCK static Keys keys(const Descent& d, const BandedForm& form, int thread) {
    return band::kind_of(d, form, thread);
  }

  template <class F>
  FASTINV_BLOCK static void pixels(const Descent& d, int image, int thread, F&& f) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int n = image + first_image(thread) + k, start = (n < d.images ? n : d.images - 1) * d.height;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = row_of(thread) + c / 2 * 8, column = band::column_of(thread) + c % 2;
        const bool inside = row < d.height && column < d.width;
        const uint32_t at = ((start + (inside ? row : 0)) * d.width + (inside ? column : 0)) * kChannels;
#pragma unroll
        for (int channel = 0; channel < kChannels; ++channel) {
          f(4 * (k * kChannels + channel) + c, channel, at + channel, n, inside);
        }
      }
    }
  }

  FASTINV_BLOCK static int pair(const Descent& d, int thread, int number) {
    const int row = row_of(thread) + number % 2 * 8, column = band::column_of(thread), sums = number / 2;
    if (row >= d.height || column >= d.width) return -1;
    // Products of constants apart, so that all of a thread's words are at constant distances from the first.
    return first_image(thread) * (kChannels * kPlane) + row_of(thread) * (band::kPitch / 2) +
           (band::kReach + column) / 2 + sums * kPlane + (kBorder + number % 2 * 8) * (band::kPitch / 2);
  }

  template <class Warp, class All>
  FASTINV_BLOCK static void multiply(const Descent& d, const BandedForm& form, const Warp& warp,
                                     const BandMemory& memory, All& all) {
    const int index = warp.index(), tile = index % band::kAcross, top = index / band::kAcross % kDown * kRows;
    const int image = index / (band::kAcross * kDown) * kTogether;

    // Adds the products of rows, in words from the first of a channel's plane, and the bands from number `band` on.
    const auto add = [&](int channel, int band, auto&& row) {
      PerLane<LeftFactor> high[kTogether], low[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int plane = ((image + k) * kChannels + channel) * kPlane + tile * band::kColumns / 2;
        const auto at = [&](int lane) { return plane + row(lane % 16) * (band::kPitch / 2) + lane / 16 * 4; };
        warp.load([&](int lane) { return memory.high + at(lane); }, high[k]);
        warp.load([&](int lane) { return memory.low + at(lane); }, low[k]);
      }
#pragma unroll
      for (int to = 0; to < kChannels; ++to) {
        PerLane<SplitRight> weights;
        warp.each([&](int lane) {
          const int kind = all[warp.thread(lane)].keys;
          weights(lane) = memory.weights[(kind * form.factors + band + to) * kWarp + lane];
        });
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const auto sums = [&](int lane) -> Sums& { return all[warp.thread(lane)].gradient[k * kChannels + to]; };
          multiply_split(warp, sums, high[k], low[k], weights);
        }
      }
    };

#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
      for (int channel = 0; channel < kChannels; ++channel) {
        add(channel, tap * kPairs + channel * kChannels, [&](int row) { return top + row + tap; });
      }
    }
#pragma unroll
    for (int edge = 0; edge < 2; ++edge) {
      const int last = edge == 0 ? 0 : d.height - 1;
      if (last / kRows * kRows != top) continue;
#pragma unroll
      for (int channel = 0; channel < kChannels; ++channel) {
        // The other rows are one of the border, which is 0.
        add(channel, (kTaps + edge) * kPairs + channel * kChannels,
            [&](int row) { return top + row == last ? kBorder + last : 0; });
      }
    }
  }

 private:
  FASTINV_BLOCK static int row_of(unsigned thread) {
    return static_cast<int>(thread / kWarp / band::kAcross % kDown * kRows + thread % kWarp / 4);
  }
  FASTINV_BLOCK static int first_image(unsigned thread) {
    return static_cast<int>(thread / kWarp / (band::kAcross * kDown) * kTogether);
  }
};

}  // namespace fastinv
