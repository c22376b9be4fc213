// A convolution of stride 1, or one that doubles the pixels, each cell of which sees the 3×3 around it: a warpgroup's
// products, of weights that stay in shared memory and of cells that are brought there once.
//
// Implicit products, tile by tile, read a pixel from the L2 cache once for every tap: with 64 channels and as many
// outputs that are 64 bytes for a multiprocessor's cycle at the full rate of its tensor cores, of which an H100's cache
// gives less than half. Here they read it once, and the taps are where in shared memory a left factor lies.
//
// A band is what a warpgroup has at a time, 64 cells in the order of their rows: 16 a warp. Rows lie in a ring, those
// of a band and the ones above and below; as soon as a band's products are done the next rows are on their way.
#pragma once

#include "warpgroup.h"

namespace fastinv {

namespace window {

constexpr int kOutputs = 64, kBand = 64, kShifts = 9;
constexpr int kTile = kOutputs * 128;  // bytes of the weights of 64 channels, for a shift and a phase

// Which of the pixels around a cell its phases read: all where there is one phase; where there are four, those of an
// even row the cell's own row and the one above, of an odd row the one below, too; and so for columns.
template <int kPhases>
struct Taps {
  static constexpr int kPlaces = kPhases == 1 ? kShifts : 16;

  FASTINV_BOTH static constexpr bool reads(int phase, int shift) {
    const int down = shift / 3 - phase / 2, right = shift % 3 - phase % 2;
    return kPhases == 1 || (down >= 0 && down <= 1 && right >= 0 && right <= 1);
  }
  // The number of the two among all that do, shift by shift: three rows of shifts have 4, 8 and 4 of them.
  FASTINV_BOTH static constexpr int place(int phase, int shift) {
    if (kPhases == 1) return shift;
    const int row = shift / 3, column = shift % 3;
    const int before = row * 4 + (row == 2 ? 4 : 0), beside = column + (column == 2 ? 1 : 0);
    return before + beside * of(row) + (phase / 2 - row / 2) * of(column) + phase % 2 - column / 2;
  }

 private:
  FASTINV_BOTH static constexpr int of(int side) { return side == 1 ? 2 : 1; }  // phases that read there
};

// Rows of so many cells that a band sees, at most.
FASTINV_BOTH constexpr int rows_seen(int width) {
  return 2 + (kBand % width == 0 ? kBand / width : width % kBand == 0 ? 1 : (width + kBand - 2) / width + 1);
}

// What all warpgroups of a layer share: its weights, kPixel zeros behind them, and its bias.
template <int kWeights, int kPixel, class Layer, class Thread>
FASTINV_BLOCK void share(const Layer& p, const Thread& self, int threads, unsigned char* shared) {
  copy_all(self, threads, shared, p.weights, kWeights);
  clear_all(self, threads, shared + kWeights, kPixel);
  share_bias<kOutputs>(self, threads, reinterpret_cast<float*>(shared + kWeights + kPixel), p.bias, p.outputs);
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

// For images of kWidth cells across, or where that is 0 of as many as is told.
template <class Type, int kInputs, int kWidth, int kPhases, class Thread>
class Window {
 public:
  static constexpr int kPixel = 2 * kInputs;                                        // bytes
  static constexpr int kWeights = Taps<kPhases>::kPlaces * kTile * (kInputs / 64);  // of the block
  static constexpr int kAtOnce = 2;  // 16s of channels of which a thread has fragments

  // Bytes of a warpgroup.
  FASTINV_BOTH static constexpr int ring(int width) { return rows_seen(width) * width * kPixel; }

  // Args:
  //   x: two-byte values [images, height, width, kInputs], from a multiple of 16 bytes on.
  //   weights, zeros, ring: in shared memory; kWeights, kPixel and `ring` bytes.
  FASTINV_BLOCK Window(Thread& self, const void* x, int height, int width, const unsigned char* weights,
                       const unsigned char* zeros, unsigned char* ring)
      : self_(self),
        x_(static_cast<const unsigned char*>(x)),
        height_(height),
        width_(width),
        warp_(self.index() % kTeam / kWarp),
        lane_(self.index() % kWarp),
        weights_(weights),
        zeros_(zeros),
        ring_(ring) {}

  FASTINV_BLOCK int width() const { return kWidth > 0 ? kWidth : width_; }

  // Start the rows on their way that band `band` of image n reads and the one before it did not.
  FASTINV_BLOCK void fetch(int n, int band) {
    constexpr int kPieces = kPixel / 16, kStep = kTeam / kPieces;  // of a pixel; and pixels at once, a multiple of 8
    const int begin = band == 0 ? 0 : last_row(band - 1) + 2, after = last_row(band) + 2;
    const int end = after < height_ ? after : height_;
    const int thread = self_.index() % kTeam, first = thread / kPieces, piece = thread % kPieces;
    const int to = first * kPixel + (piece ^ first % 8) * 16;
    const unsigned char* from = x_ + (int64_t{n} * height_ + begin) * row_bytes() + thread * 16;
#pragma unroll 1
    for (int row = begin; row < end; ++row, from += row_bytes()) {
      unsigned char* place = place_of(row) + to;
#pragma unroll 4
      for (int i = 0; first + i < width(); i += kStep) self_.copy(place + i * kPixel, from + i * kPixel);
    }
  }

  // What this thread has started is there.
  FASTINV_BLOCK void wait() { self_.wait_copies(); }

  // sums[phase] = Σ x[cell + shift] · weights[shift, phase], of a band that is there.
  FASTINV_BLOCK void multiply(int band, float (&sums)[kPhases][kOutputs / 2]) {
    const Right weights(weights_);
    along_taps(band, [&](int shift, int step, const uint32_t (&fragment)[4], bool keep) {
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) {
        if (!Taps<kPhases>::reads(phase, shift)) continue;
        const int tile = Taps<kPhases>::place(phase, shift) * (kInputs / 64) + step / 4;
        self_.product(Type{}, sums[phase], fragment, weights + (tile * kTile + step % 4 * 32), keep);
      }
    });
  }

 protected:
  // products(shift, step, fragment, keep) for every sixteen channels of every pixel around a band's cells; `keep`: of
  // all but the first, which every phase has.
  template <class F>
  FASTINV_BLOCK void along_taps(int band, F&& products) {
    const int cell = band * kBand + warp_ * 16 + lane_ % 16;
    const int own_row = cell / width(), own_column = cell % width();
    const unsigned char* rows[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) rows[i] = place_of(own_row + i - 1 + (own_row + i == 0 ? rows_seen(width()) : 0));
    uint32_t left[2][kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kShifts; ++i) {
      const int shift = (i + kShifts / 2) % kShifts;  // the cell itself first, which all phases read
      const int row = own_row + shift / 3 - 1, column = own_column + shift % 3 - 1;
      const bool inside = row >= 0 && row < height_ && column >= 0 && column < width();
      const unsigned char* pixel = inside ? rows[shift / 3] + column * kPixel : zeros_;
      const int key = column & 7, half = lane_ / 16;
      along_channels<kInputs / 16, kAtOnce>(
          self_, left, pixel, half, key,
          [&](int step, const uint32_t (&fragment)[4]) { products(shift, step, fragment, i + step > 0); });
    }
    self_.template wait_products<0>();
  }

  FASTINV_BLOCK int row_bytes() const { return width() * kPixel; }
  FASTINV_BLOCK unsigned char* place_of(int row) const { return ring_ + row % rows_seen(width()) * row_bytes(); }
  // Of a band, in the image or beyond it.
  FASTINV_BLOCK int last_row(int band) const { return (band * kBand + kBand - 1) / width(); }

  Thread& self_;
  const unsigned char* x_;
  const int height_, width_, warp_, lane_;
  const unsigned char *weights_, *zeros_;
  unsigned char* ring_;
};

}  // namespace window

}  // namespace fastinv
