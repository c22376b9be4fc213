// rMLE by gradient descent where the objective's gradient is H·z + c, a convolution whose weights differ near the
// border (fastinv/backends/cuda_quadratic.py), plus that of λ·TV_β where H does not hold it (He et al. 2019, Algorithm
// 1).
//
// A block has one image for many steps. The image lies in shared memory, plane by plane with a border of zeros, beside
// the weights; a thread has `rows` pixels of a column, one below the other, with their moments, in registers. A value
// of the image then serves several of its sums, and four weights are read at once.
#pragma once

#include "block.h"

namespace fastinv {

enum class Optimizer : int32_t { kAdam, kAmsgrad, kSgd };

struct Descent {
  // float32 [images, height, width, channels]: the image, the gradient at 0, and the moments.
  float* z;
  const float* constant;
  float *first, *second, *largest;
  // float32 [row kinds, column kinds, columns of taps, channels in, rows of taps · channels out, rounded up to 4].
  const float* weight;
  const int32_t *row_kind, *column_kind;  // [height], [width]
  const float* rates;                     // [steps, 2]: for Adam lr / (1 − β1^t) and (1 − β2^t)^(−1/2), for SGD lr
  const float *low, *high;                // [channels], or null
  int32_t *running, *taken;               // [images]: 1 while an image has steps to take, then 2; how many it has taken
  int32_t images, height, width, channels, taps_y, taps_x, row_kinds, column_kinds;
  int32_t steps, most;  // in all, and in one launch
  Optimizer optimizer;
  float rest1, beta2, rest2, eps, momentum;  // rest1, rest2: 1 − β1, 1 − β2
  float tv_weight, half_beta, root;          // tv_weight 0: H has it; root: what is added to the squares
};

constexpr int kMostThreads = 256;  // of a block: then each can have 255 registers
constexpr int kFinished = 2;

template <int kChannels_, int kTaps_, int kRows_>
struct Tile {
  static constexpr int kChannels = kChannels_, kTaps = kTaps_;
  static constexpr int kRows = kRows_;                             // of a thread
  static constexpr int kReach = kTaps / 2;                         // taps to each side
  static constexpr int kFours = (kTaps * kChannels + 3) / 4;       // of weights for a value of a row
  static constexpr int kWeights = kTaps * kChannels * kFours * 4;  // of a kind
};

// Of a block for this image: threads, and floats of shared memory.
template <class T>
FASTINV_BOTH int threads_of(const Descent& d) {
  return ((d.height + T::kRows - 1) / T::kRows * d.width + 31) / 32 * 32;
}
template <class T>
FASTINV_BOTH int padded_rows(const Descent& d) {
  return (d.height + T::kRows - 1) / T::kRows * T::kRows + 2 * T::kReach;
}
template <class T>
FASTINV_BOTH int shared_floats(const Descent& d) {
  return d.row_kinds * d.column_kinds * T::kWeights + T::kChannels * padded_rows<T>(d) * (d.width + 2 * T::kReach);
}

// What a thread keeps: of its pixels, [row][channel].
template <class T>
struct Pixels {
  float z[T::kRows][T::kChannels], constant[T::kRows][T::kChannels], gradient[T::kRows][T::kChannels];
  float first[T::kRows][T::kChannels], second[T::kRows][T::kChannels], largest[T::kRows][T::kChannels];
  const Four* weights[T::kRows];  // of the row's kind
  int row, column;                // of the first; a thread that has none is at column −1
  bool uniform;                   // whether all rows are of the same kind
};

template <class T>
struct Image {
  float* plane;  // pixel (0, 0) of channel 0, inside its border
  int pitch, size;

  FASTINV_BLOCK float& at(int row, int column, int channel) const {
    return plane[channel * size + row * pitch + column];
  }
};

// gradient = H·z + constant.
template <class T, bool kUniform>
FASTINV_BLOCK void times_matrix(const Image<T>& image, Pixels<T>& p) {
  for (int r = 0; r < T::kRows; ++r) {
    for (int c = 0; c < T::kChannels; ++c) p.gradient[r][c] = p.constant[r][c];
  }
#pragma unroll 1
  for (int tap = 0; tap < T::kTaps; ++tap) {
#pragma unroll
    for (int k = 0; k < T::kChannels; ++k) {
      float x[T::kRows + T::kTaps - 1];
#pragma unroll
      for (int i = 0; i < T::kRows + T::kTaps - 1; ++i) {
        x[i] = image.at(p.row + i - T::kReach, p.column + tap - T::kReach, k);
      }
      const int place = (tap * T::kChannels + k) * T::kFours;
#pragma unroll
      for (int f = 0; f < T::kFours; ++f) {
        Four w = p.weights[0][place + f];
#pragma unroll
        for (int r = 0; r < T::kRows; ++r) {
          if (!kUniform && r > 0) w = p.weights[r][place + f];
#pragma unroll
          for (int l = 0; l < 4; ++l) {
            const int i = (4 * f + l) / T::kChannels, c = (4 * f + l) % T::kChannels;
            if (i < T::kTaps) p.gradient[r][c] += w.at[l] * x[r + i];
          }
        }
      }
    }
  }
}

// dy and dx at a pixel of the image, 0 over its border, and (dy² + dx² + root)^(β/2 − 1).
struct Differences {
  float dy, dx, factor;
};

template <class T>
FASTINV_BLOCK Differences differences(const Descent& d, const Image<T>& image, int row, int column, int channel) {
  const float here = image.at(row, column, channel);
  const float dy = row + 1 < d.height ? image.at(row + 1, column, channel) - here : 0.0f;
  const float dx = column + 1 < d.width ? image.at(row, column + 1, channel) - here : 0.0f;
  float square = dy * dy + dx * dx + d.root;
  if (square < 1e-30f) square = 1e-30f;  // where a difference is 0 so is the slope; but not 0 · ∞
  if (d.half_beta == 1.0f) return {dy, dx, 1.0f};
  if (d.half_beta == 0.5f) return {dy, dx, 1.0f / sqrtf(square)};
  return {dy, dx, powf(square, d.half_beta - 1.0f)};
}

// The gradient of tv_weight · TV_β at a pixel.
template <class T>
FASTINV_BLOCK float variation_slope(const Descent& d, const Image<T>& image, int row, int column, int channel) {
  const Differences here = differences(d, image, row, column, channel);
  float slope = -(here.dy + here.dx) * here.factor;
  if (row > 0) {
    const Differences above = differences(d, image, row - 1, column, channel);
    slope += above.dy * above.factor;
  }
  if (column > 0) {
    const Differences left = differences(d, image, row, column - 1, channel);
    slope += left.dx * left.factor;
  }
  return d.tv_weight * 2.0f * d.half_beta * slope;
}

// Adam: Kingma and Ba 2015; AMSGrad: Reddi et al. 2018; both and SGD as in PyTorch.
template <class T>
FASTINV_BLOCK void step(const Descent& d, const float* rate, Pixels<T>& p, int r, int c) {
  const float g = p.gradient[r][c];
  float& m = p.first[r][c];
  if (d.optimizer == Optimizer::kSgd) {
    m = d.momentum * m + g;
    p.z[r][c] -= rate[0] * m;
  } else {
    m += d.rest1 * (g - m);
    float& s = p.second[r][c];
    s = d.beta2 * s + d.rest2 * g * g;
    float scale = s;
    if (d.optimizer == Optimizer::kAmsgrad) {
      if (p.largest[r][c] > scale) scale = p.largest[r][c];
      p.largest[r][c] = scale;
    }
    p.z[r][c] -= rate[0] * m / (sqrtf(scale) * rate[1] + d.eps);
  }
  if (d.low != nullptr) {
    if (p.z[r][c] < d.low[c]) p.z[r][c] = d.low[c];
    if (p.z[r][c] > d.high[c]) p.z[r][c] = d.high[c];
  }
}

// What a block does with its image: as many steps as are left, `most` at most.
template <class T, class Block>
FASTINV_BLOCK void descend(const Descent& d, Block& block) {
  const int n = block.index();
  if (d.running[n] != 1) return;
  const int pitch = d.width + 2 * T::kReach, size = padded_rows<T>(d) * pitch;
  const int kinds = d.row_kinds * d.column_kinds;
  float* weights = block.shared();
  float* planes = weights + kinds * T::kWeights;
  const Image<T> image = {planes + T::kReach * pitch + T::kReach, pitch, size};
  const int64_t own = int64_t{n} * d.height * d.width * T::kChannels;
  typename Block::template PerThread<Pixels<T>> pixels(block);
  const int begin = d.taken[n], end = d.steps - begin < d.most ? d.steps : begin + d.most;

  // For every value of a thread that is in the image: f(row in the thread, channel, place in memory).
  const auto values = [&](const Pixels<T>& p, auto f) {
    if (p.column < 0) return;
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
      if (p.row + r >= d.height) continue;
#pragma unroll
      for (int c = 0; c < T::kChannels; ++c) {
        f(r, c, own + (int64_t{p.row + r} * d.width + p.column) * T::kChannels + c);
      }
    }
  };

  block.each([&](int thread) {
    for (int i = thread; i < kinds * T::kWeights; i += block.threads()) weights[i] = d.weight[i];
    for (int i = thread; i < T::kChannels * size; i += block.threads()) planes[i] = 0.0f;
  });
  block.each([&](int thread) {
    Pixels<T>& p = pixels[thread];
    p = {};
    p.row = thread / d.width * T::kRows;
    p.column = p.row < d.height ? thread % d.width : -1;
    if (p.column < 0) return;
    p.uniform = true;
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
      const int row = p.row + r < d.height ? p.row + r : d.height - 1;
      p.weights[r] = reinterpret_cast<const Four*>(weights) +
                     (d.row_kind[row] * d.column_kinds + d.column_kind[p.column]) * (T::kWeights / 4);
      p.uniform = p.uniform && p.weights[r] == p.weights[0];
    }
    values(p, [&](int r, int c, int64_t at) {
      p.z[r][c] = d.z[at];
      p.constant[r][c] = d.constant[at];
      p.first[r][c] = d.first[at];
      p.second[r][c] = d.second[at];
      p.largest[r][c] = d.largest[at];
      image.at(p.row + r, p.column, c) = p.z[r][c];
    });
  });
  for (int t = begin; t < end; ++t) {
    block.each([&](int thread) {
      Pixels<T>& p = pixels[thread];
      if (p.column < 0) return;
      if (p.uniform) {
        times_matrix<T, true>(image, p);
      } else {
        times_matrix<T, false>(image, p);
      }
      if (d.tv_weight > 0.0f) {
        values(p,
               [&](int r, int c, int64_t) { p.gradient[r][c] += variation_slope(d, image, p.row + r, p.column, c); });
      }
    });
    block.each([&](int thread) {
      Pixels<T>& p = pixels[thread];
      values(p, [&](int r, int c, int64_t) {
        step(d, d.rates + 2 * t, p, r, c);
        image.at(p.row + r, p.column, c) = p.z[r][c];
      });
    });
  }
  block.each([&](int thread) {
    values(pixels[thread], [&](int r, int c, int64_t at) {
      const Pixels<T>& p = pixels[thread];
      d.z[at] = p.z[r][c];
      d.first[at] = p.first[r][c];
      d.second[at] = p.second[r][c];
      d.largest[at] = p.largest[r][c];
    });
    if (thread > 0) return;
    d.taken[n] = end;
    if (end == d.steps) d.running[n] = kFinished;
  });
}

// visit(Tile<…>()) for the tile that a problem takes, and whether there is one: MNIST's and CIFAR's shallow edges.
template <class F>
bool with_tile(const Descent& d, F&& visit) {
  const auto square = [&d](int channels, int taps) {
    return d.channels == channels && d.taps_y == taps && d.taps_x == taps;
  };
  const auto fits = [&](auto tile) {
    using T = decltype(tile);
    constexpr int64_t kMostShared = 227 * 1024;
    if (threads_of<T>(d) > kMostThreads || int64_t{shared_floats<T>(d)} * 4 > kMostShared) return false;
    visit(tile);
    return true;
  };
  if (square(1, 5)) return fits(Tile<1, 5, 7>());
  if (square(1, 9)) return fits(Tile<1, 9, 7>());
  if (square(3, 5)) return fits(Tile<3, 5, 4>());
  return false;
}

bool fits(const Descent& descent);             // whether there is a kernel for it
void descend_on_host(const Descent& descent);  // for memory of the host
// For memory of this device; returns before it is done. Throws std::runtime_error.
void launch_descend(const Descent& descent, int device, uintptr_t stream);

}  // namespace fastinv
