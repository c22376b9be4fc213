// `quadratic.h`'s steps for sixteen images of one channel at once, on tensor cores.
//
// Row y of H·z is Σ z[y + i − border] · T[y, i] over the taps i, and T[y, i] a band: eight of its columns are reached
// from sixteen, those and four to each side. So sixteen images' sixteen columns of a row are a left factor, and what
// there is at a border costs nothing: a row near it has a T of its own. Both factors are float32 in two halves of
// float16, of which three of four products count. A warp has eight columns of seven rows, a lane their sums and pixels
// as `warp.h` tells: sums[row], image lane / 4 + 8·i, column 2·(lane % 4) + e at 2·i + e.
#pragma once

#include "descent.h"
#include "quadratic.h"

namespace fastinv {

struct BandedForm {
  const float* constant;  // c: float32 [images, height, width]
  // Right factors, each 32 lanes' high words and low words: one for each row tap and kind of eight columns, of every
  // kind of row; weights are multiplied by `scale`.
  const uint32_t* weights;
  const int32_t *first, *kind;  // [height], the number of a row's first tap in these; [width / 8, rounded up]
  int32_t taps, rows, kinds;    // rows · kinds right factors
  float scale, unscale;         // one is 1 / the other
};

template <int kTaps>
struct Banded {
  static constexpr int kImages = 16, kRows = 7, kColumns = 8, kReach = 4;  // columns to each side
  static constexpr int kDown = 4, kAcross = 4, kThreads = kDown * kAcross * kWarp;
  static constexpr int kPitch =
      kAcross * kColumns + 2 * kReach;       // of a row, in halves: 80 bytes, without bank conflicts
  static constexpr int kFactor = 4 * kWarp;  // words
  static constexpr int kBlocks = 1, kMostThreads = kThreads;

  struct Own {
    float z[kRows][4], first[kRows][4];
    Sums gradient[kRows];  // times `scale`
    // Of each row a byte, the number among the row taps in memory of its tap −kTaps; then the kind of columns.
    uint64_t weights;
  };

  BandedForm form;

  FASTINV_BOTH explicit Banded(const BandedForm& f) : form(f) {}
  FASTINV_BOTH static int plane(const Descent& d) { return d.height * kImages * kPitch / 2; }  // words
  FASTINV_BOTH int shared_floats(const Descent& d) const {
    return form.rows * form.kinds * kFactor + kRows * 4 * kThreads + 2 * plane(d);
  }
  FASTINV_BOTH bool takes(const Descent& d) const {
    return d.channels == 1 && d.height <= kDown * kRows && d.width <= kAcross * kColumns && form.taps == kTaps &&
           d.tv_weight == 0.0f && d.optimizer != Optimizer::kAmsgrad;  // there is no room for its third moment
  }

  // The steps of a block's images: all have taken as many, as nothing stops one before the others.
  template <class Block>
  FASTINV_BLOCK void descend(const Descent& d, Block& block) {
    const int image = block.index() * kImages;
    int begin = -1;
    for (int n = image; n < image + kImages && n < d.images; ++n) {
      if (d.running[n] == 1) begin = d.taken[n];
    }
    if (begin < 0) return;
    const int end = end_of(d, begin);
    weights_ = reinterpret_cast<Words*>(block.shared());
    second_ = block.shared() + form.rows * form.kinds * kFactor;
    high_ = reinterpret_cast<uint32_t*>(second_ + kRows * 4 * kThreads);
    low_ = high_ + plane(d);
    typename Block::template PerThread<Own> all(block);

    block.each([&](int thread) {
      const auto* from = reinterpret_cast<const Words*>(form.weights);
      for (int i = thread; i < form.rows * form.kinds * kWarp; i += kThreads) weights_[i] = from[i];
      for (int i = thread; i < 2 * plane(d); i += kThreads) high_[i] = 0;
    });
    block.each([&](int thread) { start(d, image, afresh(thread), all[thread]); });
    block.each([&](int thread) {
      pixels(d, image, thread, [&](int r, int c, uint32_t at) { all[thread].gradient[r].at[c] = constant(at); });
    });
    for (int t = begin; t < end; ++t) {
      block.each_warp([&](const auto& warp) { multiply(d, warp, all); });
      block.each([&](int thread) { advance(d, image, t, afresh(thread), all[thread]); });
    }
    block.each([&](int thread) { finish(d, afresh(image), thread, all[thread]); });
    block.each([&](int thread) { report(d, image, thread); });
  }

 private:
  // A thread's first row and column, and its image number i.
  FASTINV_BLOCK static int row_of(int thread) { return thread / kWarp / kAcross * kRows; }
  FASTINV_BLOCK static int column_of(int thread) { return thread / kWarp % kAcross * kColumns + thread % 4 * 2; }
  FASTINV_BLOCK static int image_of(int thread, int i) { return thread % kWarp / 4 + 8 * i; }

  // f(row, place among the four of a row, where it lies in memory) for all of a thread's pixels. Those that are not in
  // the image have the place of one that is, so that there is nothing to branch on: they go with the others, and nobody
  // looks at them.
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
      for (int c = 0; c < 4; ++c) f(r, c, first[c] + line);
    }
  }
  FASTINV_BLOCK float& second(int thread, int r, int c) const { return second_[(r * 4 + c) * kThreads + thread]; }

  FASTINV_BLOCK void start(const Descent& d, int image, int thread, Own& own) const {
    own = {};
    const int tile = column_of(thread) / kColumns;
    if (tile * kColumns < d.width) own.weights = uint64_t(form.kind[tile]) << 8 * kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(thread) + r;
      if (row < d.height) own.weights |= uint64_t(form.first[row] + kTaps) << 8 * r;
    }
    pixels(d, image, thread, [&](int r, int c, uint32_t at) {
      own.z[r][c] = d.z[at];
      own.first[r][c] = d.first[at];
      second(thread, r, c) = d.second[at];
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) put(d, thread, r, own.z[r]);
  }

  // Of a pixel, for the next product to add to.
  FASTINV_BLOCK float constant(uint32_t at) const { return form.constant[at] * form.scale; }

  // A row's pixels in halves, where tensor cores read them. Weights are 0 for a pixel after the last column.
  FASTINV_BLOCK void put(const Descent& d, int thread, int r, const float (&z)[4]) const {
    const int row = row_of(thread) + r, column = column_of(thread);
    if (row >= d.height || column >= d.width) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = ((row * kImages + image_of(thread, i)) * kPitch + kReach + column) / 2;
      const Halved both = halved(z[2 * i], z[2 * i + 1]);
      high_[at] = both.high;
      low_[at] = both.low;
    }
  }

  // Adds H·z to the gradients.
  template <class Warp, class All>
  FASTINV_BLOCK void multiply(const Descent& d, const Warp& warp, All& all) const {
    const int index = afresh(warp.index()), tile = index % kAcross, top = index / kAcross * kRows;
    if (tile * kColumns >= d.width) return;
    const int step = afresh(form.kinds * kWarp);
#pragma unroll
    for (int k = 0; k < kRows + kTaps - 1; ++k) {
      const int row = top + k - kTaps / 2;
      if (row < 0 || row >= d.height) continue;
      const auto load = [&](const uint32_t* plane, PerLane<LeftFactor>& to) {
        warp.load(
            [&](int lane) {
              return plane + ((row * kImages + lane % 16) * kPitch + tile * kColumns + lane / 16 * 8) / 2;
            },
            to);
      };
      PerLane<LeftFactor> high, low;
      load(high_, high);
      load(low_, low);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int tap = k - r;
        if (tap < 0 || tap >= kTaps || top + r >= d.height) continue;
        PerLane<RightFactor> weight_high, weight_low;
        warp.each([&](int lane) {
          const uint64_t of = all[warp.thread(lane)].weights;
          const int first = static_cast<int>(of >> 8 * r & 0xff), kind = static_cast<int>(of >> 8 * kRows);
          const Words words = weights_[(first + tap - kTaps) * step + kind * kWarp + lane];
          weight_high(lane) = {{words.at[0], words.at[1]}};
          weight_low(lane) = {{words.at[2], words.at[3]}};
        });
        const auto sums = [&](int lane) -> Sums& { return all[warp.thread(lane)].gradient[r]; };
        warp.multiply(sums, low, weight_high);
        warp.multiply(sums, high, weight_low);
        warp.multiply(sums, high, weight_high);
      }
    }
  }

  FASTINV_BLOCK void advance(const Descent& d, int image, int t, int thread, Own& own) const {
    const Rule rule = rule_of(d, t, 0);
    pixels(d, image, thread, [&](int r, int c, uint32_t at) {
      float unused = 0.0f;
      step(d, rule, own.gradient[r].at[c] * form.unscale, own.z[r][c], own.first[r][c], second(thread, r, c), unused);
      own.gradient[r].at[c] = constant(at);
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) put(d, thread, r, own.z[r]);
  }

  FASTINV_BLOCK void finish(const Descent& d, int image, int thread, const Own& own) const {
    pixels(d, image, thread, [&](int r, int c, uint32_t at) {
      const int n = image + image_of(thread, c / 2);
      const bool inside = row_of(thread) + r < d.height && column_of(thread) + c % 2 < d.width;
      if (!inside || n >= d.images || d.running[n] != 1) return;
      d.z[at] = own.z[r][c];
      d.first[at] = own.first[r][c];
      d.second[at] = second(thread, r, c);
    });
  }

  FASTINV_BLOCK void report(const Descent& d, int image, int thread) const {
    const int n = image + thread;
    if (thread >= kImages || n >= d.images || d.running[n] != 1) return;
    d.taken[n] = end_of(d, d.taken[n]);
    if (d.taken[n] == d.steps) d.running[n] = kFinished;
  }

  Words* weights_ = nullptr;                   // all in shared memory
  float* second_ = nullptr;                    // [row · 4 + place][thread]: there are no registers for them
  uint32_t *high_ = nullptr, *low_ = nullptr;  // z: [row][image][columns, with kReach more at each end]
};

template <int kTaps, class Block>
FASTINV_BLOCK void descend(const Descent& d, Banded<kTaps> edge, Block& block) {
  edge.descend(d, block);
}
template <int kTaps>
Grid grid_of(const Descent& d, const Banded<kTaps>& edge) {
  constexpr int kImages = Banded<kTaps>::kImages;
  return {(d.images + kImages - 1) / kImages, Banded<kTaps>::kThreads, edge.shared_floats(d)};
}

// visit(edge), and whether there is a kernel for this form.
template <class F>
bool with_edge(const Descent& d, const BandedForm& form, F&& visit) {
  const auto take = [&](auto edge) {
    if (!edge.takes(d) || !has_room(d, edge)) return false;
    visit(edge);
    return true;
  };
  return take(Banded<9>{form}) || take(Banded<5>{form});
}

}  // namespace fastinv
