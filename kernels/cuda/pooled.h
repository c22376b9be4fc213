// An edge of two layers, convolution, ReLU, 2×2 max pool, convolution, ReLU: MNIST's ReLU2. All activations are on
// chip.
#pragma once

#include "descent.h"

namespace fastinv {

// Weights are packed as `convolve` and `correlate` read them.
struct PooledLayers {
  const float* target;  // float32 [images, rows of the result, columns, kSecond]
  const float *first, *first_bias, *second, *second_bias, *second_back, *first_back;
};

// Sums of a convolution at two neighbours in a row, four channels each: weights [channel in, row tap, column tap,
// channel out], `fours` of them a tap.
template <int kTaps>
FASTINV_BLOCK void correlate(const Planes& planes, int channels, int row, int column, const Four* weights, int fours,
                             float (&sum)[2][4]) {
#pragma unroll 1
  for (int c = 0; c < channels; ++c) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      float x[kTaps + 1];
#pragma unroll
      for (int j = 0; j <= kTaps; ++j) x[j] = planes.at(row + i, column + j, c);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const Four w = weights[((c * kTaps + i) * kTaps + j) * fours];
#pragma unroll
        for (int l = 0; l < 4; ++l) {
          sum[0][l] += w.at[l] * x[j];
          sum[1][l] += w.at[l] * x[j + 1];
        }
      }
    }
  }
}

template <int kTaps_, int kFirst_, int kSecond_>
struct Pooled {
  static constexpr int kTaps = kTaps_, kFirst = kFirst_, kSecond = kSecond_;  // channels of the layers
  using P = Pixels<1, 4>;
  static constexpr int kBorder = 0;
  static constexpr int kBlocks = 1;
  static constexpr int kMostThreads = kManyRegisters;
  static constexpr int kEdge = kTaps - 1;  // what a convolution takes away
  static constexpr int kFirstWeights = kTaps * kTaps * kFirst, kSecondWeights = kFirstWeights * kSecond;
  static constexpr int kBackWeights = kTaps * kFirst * ((kTaps + 3) / 4 * 4);

  struct Own {
    P pixels;
    const Four* weights[P::kRows];
  };

  PooledLayers layers;
  float *first = nullptr, *second = nullptr, *second_back = nullptr, *first_back = nullptr;  // weights
  int image = 0;                                                                             // the block's
  // In shared memory: after the pool, and which of four was the largest; gradients of both convolutions, with a border.
  Planes pooled{}, place{}, second_gradient{}, first_gradient{};

  FASTINV_BOTH static int halved(int side) { return (side - kEdge) / 2; }
  FASTINV_BOTH int shared_floats(const Descent& d) const {
    const int height = halved(d.height), width = halved(d.width);
    return kFirstWeights + 2 * kSecondWeights + kBackWeights + 2 * kFirst * height * width +
           kSecond * (height + kEdge) * (width + kEdge) + kFirst * (d.height + kEdge) * (d.width + kEdge);
  }

  template <class Block>
  FASTINV_BLOCK void begin(const Descent& d, Block& block, float* memory) {
    image = block.index();
    const int height = halved(d.height), width = halved(d.width);
    const auto take = [&memory](int floats) {
      float* taken = memory;
      memory += floats;
      return taken;
    };
    const auto planes = [&](int channels, int rows, int columns, int border) -> Planes {
      float* begin = take(channels * rows * columns);
      return {begin + border * (columns + 1), columns, rows * columns};
    };
    float* all = memory;
    first = take(kFirstWeights);
    second = take(kSecondWeights);
    second_back = take(kSecondWeights);
    first_back = take(kBackWeights);
    pooled = planes(kFirst, height, width, 0);
    place = planes(kFirst, height, width, 0);
    second_gradient = planes(kSecond, height + kEdge, width + kEdge, kEdge);
    first_gradient = planes(kFirst, d.height + kEdge, d.width + kEdge, kEdge);
    block.each([&](int thread) {
      for (int i = thread; i < shared_floats(d); i += block.threads()) all[i] = 0.0f;
    });
    block.each([&](int thread) {
      const auto copy = [&](float* to, const float* from, int size) {
        for (int i = thread; i < size; i += block.threads()) to[i] = from[i];
      };
      copy(first, layers.first, kFirstWeights);
      copy(second, layers.second, kSecondWeights);
      copy(second_back, layers.second_back, kSecondWeights);
      copy(first_back, layers.first_back, kBackWeights);
    });
  }

  FASTINV_BLOCK void own(const Descent&, int, Own& own) const {
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) own.weights[r] = reinterpret_cast<const Four*>(first_back);
  }

  template <class Block, class All>
  FASTINV_BLOCK void differentiate(const Descent& d, Block& block, const Planes& image_planes, All& all) const {
    const int height = halved(d.height), width = halved(d.width);
    block.each([&](int thread) {
      for (int i = thread; i < height * width * (kFirst / 4); i += block.threads()) {
        first_layer(image_planes, i / (kFirst / 4) / width, i / (kFirst / 4) % width, i % (kFirst / 4));
      }
    });
    const int rows = height - kEdge, columns = width - kEdge, pairs = columns / 2;
    block.each([&](int thread) {
      for (int i = thread; i < rows * pairs * (kSecond / 4); i += block.threads()) {
        second_layer(i / (kSecond / 4) / pairs, i / (kSecond / 4) % pairs * 2, i % (kSecond / 4), rows, columns);
      }
    });
    block.each([&](int thread) {
      for (int i = thread; i < height * (width / 2) * (kFirst / 4); i += block.threads()) {
        back_to_pool(i / (kFirst / 4) / (width / 2), i / (kFirst / 4) % (width / 2) * 2, i % (kFirst / 4));
      }
    });
    block.each([&](int thread) {
      Own& own = all[thread];
      P& p = own.pixels;
      if (p.column < 0) return;
#pragma unroll
      for (int r = 0; r < P::kRows; ++r) p.gradient[r][0] = 0.0f;
      convolve<kFirst, kTaps, true>(first_gradient, p.row - kEdge, p.column - kEdge, own.weights, p.gradient);
    });
  }

 private:
  // Pixel (row, column) after the pool, four channels. Of equal values the first is the largest, as in PyTorch.
  FASTINV_BLOCK void first_layer(const Planes& z, int row, int column, int group) const {
    const Four* weights = reinterpret_cast<const Four*>(first) + group;
    float sums[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int l = 0; l < 4; ++l) sums[i][0][l] = sums[i][1][l] = layers.first_bias[4 * group + l];
      correlate<kTaps>(z, 1, 2 * row + i, 2 * column, weights, kFirst / 4, sums[i]);
    }
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      float best = 0.0f, at = -1.0f;  // where none is above 0 no gradient goes back
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float value = sums[k / 2][k % 2][l];
        if (value > best) {
          best = value;
          at = static_cast<float>(k);
        }
      }
      pooled.at(row, column, 4 * group + l) = best;
      place.at(row, column, 4 * group + l) = at;
    }
  }

  // The gradient at two neighbours of the result, four channels, before its ReLU: 2 · (y − v) where y > 0.
  FASTINV_BLOCK void second_layer(int row, int column, int group, int rows, int columns) const {
    float sum[2][4];
#pragma unroll
    for (int l = 0; l < 4; ++l) sum[0][l] = sum[1][l] = layers.second_bias[4 * group + l];
    correlate<kTaps>(pooled, kFirst, row, column, reinterpret_cast<const Four*>(second) + group, kSecond / 4, sum);
    const int64_t pixel = (int64_t{image} * rows + row) * columns + column;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const int c = 4 * group + l;
        const float y = sum[j][l];
        second_gradient.at(row, column + j, c) =
            y > 0.0f ? 2.0f * (y - layers.target[(pixel + j) * kSecond + c]) : 0.0f;
      }
    }
  }

  // From there to two neighbours after the pool, four channels, and on to what was the largest.
  FASTINV_BLOCK void back_to_pool(int row, int column, int group) const {
    float sum[2][4] = {};
    correlate<kTaps>(second_gradient, kSecond, row - kEdge, column - kEdge,
                     reinterpret_cast<const Four*>(second_back) + group, kFirst / 4, sum);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const int c = 4 * group + l;
        const float at = place.at(row, column + j, c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          first_gradient.at(2 * row + k / 2, 2 * (column + j) + k % 2, c) =
              at == static_cast<float>(k) ? sum[j][l] : 0.0f;
        }
      }
    }
  }
};

// visit(edge), and whether there is a kernel for images of this size.
template <class F>
bool with_edge(const Descent& d, const PooledLayers& layers, F&& visit) {
  using Edge = Pooled<5, 8, 16>;
  const Edge edge{layers};
  // Pixels come in fours of a column, values after the pool in pairs of a row.
  const bool whole = d.channels == 1 && d.height % 4 == 0 && d.width % 4 == 0 && d.height >= 16 && d.width >= 16;
  if (!whole || !has_room(d, edge)) return false;
  visit(edge);
  return true;
}

}  // namespace fastinv
