// A convolution of stride 1, or one that doubles the pixels, each cell of which sees the 3×3 around it: a warpgroup's
// products, of weights that stay in shared memory and of cells that are brought there once.
//
// Implicit products, tile by tile, read a pixel from the L2 cache once for every tap: with 64 channels and as many
// outputs that are 64 bytes for a multiprocessor's cycle at the full rate of its tensor cores, of which an H100's cache
// gives less than half. Here they read it once, and the taps are where in shared memory a left factor lies.
//
// A band is what a warpgroup has at a time, 64 cells in the order of their rows: 16 a warp. Rows lie in a ring, those
// of a band and the ones above and below; as soon as a band's products are done the next rows are on their way. There
// are zeros around an image, a column to either side and a row above and below, so that all cells are read alike.
#pragma once

#include <algorithm>

#include "taps.h"
#include "turns.h"
#include "warpgroup.h"

namespace fastinv {

namespace window {

constexpr int kOutputs = 64, kBand = 64;
constexpr int kTile = kOutputs * 128;  // bytes of the weights of 64 channels, for a shift and a phase

// Rows of so many cells that a band sees, at most.
FASTINV_BOTH constexpr int rows_seen(int width) {
  return 2 + (kBand % width == 0 ? kBand / width : width % kBand == 0 ? 1 : (width + kBand - 2) / width + 1);
}

// n / d where a launch knows d, and the compiler does not: a product and a shift in place of some twenty instructions
// (Granlund and Montgomery 1994, "Division by invariant integers using multiplication").
struct Divisor {
  uint32_t factor = 0;  // 2^shift / d, rounded up
  int32_t shift = 31;

  Divisor() = default;
  explicit Divisor(int d) {
    while (int64_t{1} << (shift - 31) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
  }

  // For n from 0 to 2^31 − 1.
  FASTINV_BOTH int of(int n) const { return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * factor >> shift); }
};

// Cells across an image, what follows from them, and what takes long to divide by: known to the compiler, or where
// kWidth is 0 told.
template <int kWidth>
struct Across {
  FASTINV_BOTH static constexpr int cells() { return kWidth; }
  FASTINV_BOTH static constexpr int seen() { return rows_seen(kWidth); }
  FASTINV_BOTH static constexpr int row_of(int cell) { return cell / kWidth; }
  FASTINV_BOTH static constexpr int turn(int row) { return row % rows_seen(kWidth); }
};
template <>
struct Across<0> {
  Across() = default;
  explicit Across(int width)
      : width_(width),
        seen_(width > 0 ? rows_seen(width) : 0),
        by_width_(std::max(width, 1)),
        by_seen_(std::max(seen_, 1)) {}

  FASTINV_BOTH int cells() const { return width_; }
  FASTINV_BOTH int seen() const { return seen_; }
  FASTINV_BOTH int row_of(int cell) const { return by_width_.of(cell); }
  FASTINV_BOTH int turn(int row) const { return row - by_seen_.of(row) * seen_; }

 private:
  int32_t width_ = 0, seen_ = 0;
  Divisor by_width_, by_seen_;
};

// What all warpgroups of a layer share, its weights and its bias; and zeros in their rings.
template <int kWeights, class Thread>
FASTINV_BLOCK void share(const Thread& self, int threads, unsigned char* shared, int shared_bytes, const void* weights,
                         const float* bias, int outputs) {
  constexpr int kBias = 4 * kOutputs;
  copy_all(self, threads, shared, weights, kWeights);
  share_bias<kOutputs>(self, threads, reinterpret_cast<float*>(shared + kWeights), bias, outputs);
  clear_all(self, threads, shared + kWeights + kBias, shared_bytes - kWeights - kBias);
  self.publish();
}

// Start on its way what follows a band: in the image, or the first of the one `step` further on, if that is there.
template <class Cells>
FASTINV_BLOCK void fetch_next(Cells& cells, int n, int band, int bands, int step, int images) {
  if (band + 1 < bands) {
    cells.fetch(n, band + 1);
  } else if (n + step < images) {
    cells.fetch(n + step, 0);
  }
}

// For images as `Across` says.
template <class Type, int kInputs, int kWidth, class Taps, class Thread>
class Window {
 public:
  static constexpr int kPhases = Taps::kPhases;
  static constexpr int kPixel = 2 * kInputs;                               // bytes
  static constexpr int kWeights = Taps::kPlaces * kTile * (kInputs / 64);  // of the block
  static constexpr int kAtOnce = kInputs / 32;  // 16s of channels of which a thread has fragments

  // Bytes of a warpgroup.
  FASTINV_BOTH static constexpr int ring(int width) { return rows_seen(width) * (width + 2) * kPixel; }

  // Args:
  //   x: two-byte values [images, height, width, kInputs], from a multiple of 16 bytes on.
  //   weights, ring: in shared memory; the ring is full of zeros before the first rows are fetched.
  FASTINV_BLOCK Window(Thread& self, const void* x, int height, Across<kWidth> across, const unsigned char* weights,
                       unsigned char* ring)
      : self_(self),
        x_(static_cast<const unsigned char*>(x)),
        height_(height),
        across_(across),
        warp_(self.index() % kTeam / kWarp),
        lane_(self.index() % kWarp),
        weights_(weights),
        ring_(ring) {}

  // Start the rows on their way that band `band` of image n reads and the one before it did not.
  FASTINV_BLOCK void fetch(int n, int band) {
    constexpr int kPieces = kPixel / 16, kStep = kTeam / kPieces;  // of a pixel; and pixels at once
    const int begin = band == 0 ? -1 : last_row(band - 1) + 2, after = last_row(band) + 2;
    const int end = after < height_ + 1 ? after : height_ + 1;
    const int thread = self_.index() % kTeam, piece = thread % kPieces, width = across_.cells();
    const unsigned char* from = x_ + (int64_t{n} * height_ + begin) * (width * kPixel) + piece * 16;
    // All rows as one, so that copies of a few small ones are under way together.
    const int pixels = (end - begin) * width;
#pragma unroll 4
    for (int pixel = thread / kPieces; pixel < pixels; pixel += kStep) {
      const int down = across_.row_of(pixel), row = begin + down, place = pixel - down * width + 1;
      const bool inside = row >= 0 && row < height_;  // where it is not, nothing is read
      self_.copy(place_of(row) + place * kPixel + (piece ^ place % 8) * 16, from + pixel * kPixel, inside);
    }
  }

  // What this thread has started is there.
  FASTINV_BLOCK void wait() { self_.wait_copies(); }

  // sums[phase] = Σ x[cell + shift] · weights[shift, phase], of a band that is there. `ready` is called before the
  // first products, when all is there for them.
  template <class Ready>
  FASTINV_BLOCK void multiply(int band, float (&sums)[kPhases][kOutputs / 2], Ready&& ready) {
    const Right weights(weights_);
    along_taps(
        band,
        [&](int shift, int step, const uint32_t (&fragment)[4], bool keep) {
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase) {
            if (!Taps::reads(phase, shift)) continue;
            const int tile = Taps::place(phase, shift) * (kInputs / 64) + step / 4;
            self_.product(Type{}, sums[phase], fragment, weights + (tile * kTile + step % 4 * 32), keep);
          }
        },
        ready);
    self_.take_products(sums);
  }

 protected:
  // Starts products(shift, step, fragment, keep) for every sixteen channels of every pixel around a band's cells that
  // is read; `keep`: of all but the first, which every phase has.
  template <class F, class Ready>
  FASTINV_BLOCK void along_taps(int band, F&& products, Ready&& ready) {
    const int cell = band * kBand + warp_ * 16 + lane_ % 16;
    const int row = across_.row_of(cell), column = cell - row * across_.cells();
    const unsigned char* rows[3];  // from the cell's left neighbours on
    int turn = across_.turn(row);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      rows[i] = ring_ + turn * row_bytes() + column * kPixel;
      turn = turn + 1 == across_.seen() ? 0 : turn + 1;
    }
    uint32_t left[2][kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kShifts; ++i) {
      const int shift = (i + kShifts / 2) % kShifts;  // the cell itself first, which all phases read
      if (!read_at_all(shift)) continue;
      const unsigned char* pixel = rows[shift / 3] + shift % 3 * kPixel;
      const int key = (column + shift % 3) % 8, half = lane_ / 16;
      along_channels<kInputs / 16, kAtOnce>(
          self_, left, pixel, half, key,
          [&](int step, const uint32_t (&fragment)[4]) { products(shift, step, fragment, i + step > 0); },
          [&] {
            if (i == 0) ready();
          });
    }
  }

  FASTINV_BOTH static constexpr bool read_at_all(int shift) {
    for (int phase = 0; phase < kPhases; ++phase) {
      if (Taps::reads(phase, shift)) return true;
    }
    return false;
  }

  FASTINV_BLOCK int row_bytes() const { return (across_.cells() + 2) * kPixel; }
  // Where a row begins, −1 or more, with the column of zeros before it.
  FASTINV_BLOCK unsigned char* place_of(int row) const { return ring_ + across_.turn(row + 1) * row_bytes(); }
  // Of a band, in the image or beyond it.
  FASTINV_BLOCK int last_row(int band) const { return across_.row_of(band * kBand + kBand - 1); }

  Thread& self_;
  const unsigned char* x_;
  const int height_;
  const Across<kWidth> across_;
  const int warp_, lane_;
  const unsigned char* weights_;
  unsigned char* ring_;
};

}  // namespace window

}  // namespace fastinv
