// An edge whose objective has the gradient H·z + c, H a convolution whose weights differ near the border
// (fastinv/backends/cuda/quadratic.py).
#pragma once

#include "descent.h"

namespace fastinv {

struct QuadraticForm {
  const float* constant;  // c: float32 [images, height, width, channels]
  // float32 [row kinds, column kinds, columns of taps, channels in, rows of taps · channels out, rounded up to 4].
  const float* weight;
  const int32_t *row_kind, *column_kind;  // [height], [width]
  int32_t taps_y, taps_x, row_kinds, column_kinds;
};

template <int kChannels, int kTaps, int kRows>
struct Quadratic {
  using P = Pixels<kChannels, kRows>;
  static constexpr int kImages = 1;
  static constexpr bool kKeeps = true;
  static constexpr int kBorder = kTaps / 2;
  static constexpr int kWeights = kTaps * kChannels * ((kTaps * kChannels + 3) / 4 * 4);  // of a kind

  // Blocks of a multiprocessor: with three channels the registers of a thread have to be told, 153 would be taken.
  static constexpr int kBlocks = 2;
  static constexpr int kMostThreads = kManyRegisters;

  struct Own {
    P pixels;
    const float* constant;       // c, [row][channel], so many floats from one to the next; in shared memory
    const Four* weights[kRows];  // of the row's kind
    bool uniform;                // whether all rows are of the same kind
  };

  QuadraticForm form;
  Planes image{};
  float *weights = nullptr, *constants = nullptr;  // in shared memory

  FASTINV_BOTH int weight_floats() const { return form.row_kinds * form.column_kinds * kWeights; }
  FASTINV_BOTH int shared_floats(const Descent& d) const {
    return weight_floats() + kRows * kChannels * threads_of<Quadratic>(d);
  }

  template <class Block>
  FASTINV_BLOCK void begin(const Descent& d, Block& block, float* memory) {
    image = image_of<Quadratic>(d, block.shared(), 0);
    weights = memory;
    constants = memory + weight_floats();
    block.each([&](int thread) {
      for (int i = thread; i < weight_floats(); i += block.threads()) weights[i] = form.weight[i];
    });
  }

  FASTINV_BLOCK void own(const Descent& d, int n, Own& own) const {
    const P& p = own.pixels;
    float* constant = constants + p.row / kRows * threads_across<Quadratic>(d) + p.column;
    own.constant = constant;
    own.uniform = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = p.row + r < d.height ? p.row + r : d.height - 1;
      own.weights[r] = reinterpret_cast<const Four*>(weights) +
                       (form.row_kind[row] * form.column_kinds + form.column_kind[p.column]) * (kWeights / 4);
      own.uniform = own.uniform && own.weights[r] == own.weights[0];
      const int64_t at = ((int64_t{n} * d.height + row) * d.width + p.column) * kChannels;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        constant[(r * kChannels + c) * threads_of<Quadratic>(d)] = form.constant[at + c];
      }
    }
  }

  FASTINV_BLOCK void moved(const Descent&, int, const P&) const {}

  template <class Block, class All>
  FASTINV_BLOCK void differentiate(const Descent&, Block& block, All& all) const {
    block.each([&](int thread) {
      Own& own = all[thread];
      P& p = own.pixels;
      if (p.column < 0) return;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) p.gradient[r][c] = own.constant[(r * kChannels + c) * block.threads()];
      }
      const int row = p.row - kBorder, column = p.column - kBorder;
      if (own.uniform) {
        convolve<kChannels, kTaps, true>(image, row, column, own.weights, p.gradient);
      } else {
        convolve<kChannels, kTaps, false>(image, row, column, own.weights, p.gradient);
      }
    });
  }
};

// visit(edge) with the kernel for this form, and whether there is one: MNIST's and CIFAR-10's shallow edges.
template <class F>
bool with_edge(const Descent& d, const QuadraticForm& form, F&& visit) {
  const auto is = [&](int channels, int taps) {
    return d.channels == channels && form.taps_y == taps && form.taps_x == taps;
  };
  const auto take = [&](auto edge) {
    if (!has_room(d, edge)) return false;
    visit(edge);
    return true;
  };
  if (is(1, 5)) return take(Quadratic<1, 5, 7>{form});
  if (is(1, 9)) return take(Quadratic<1, 9, 7>{form});
  if (is(3, 5)) return take(Quadratic<3, 5, 4>{form});
  return false;
}

}  // namespace fastinv
