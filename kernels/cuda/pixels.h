// What rMLE on chip is told, the pixels of a thread, and those of an image in shared memory.
#pragma once

#include "block.h"

namespace fastinv {

enum class Optimizer : int32_t { kAdam, kAmsgrad, kSgd };

struct Descent {
  // float32 [images, height, width, channels]: the image, and the moments.
  float *z, *first, *second, *largest;
  const float* rates;       // [steps, 2]: for Adam lr / (1 − β1^t) and (1 − β2^t)^(−1/2), for SGD lr
  const float *low, *high;  // [channels], or null
  // [images]: 1 while an image has steps to take, then 2; how many it has taken, all that run as many.
  int32_t *running, *taken;
  int32_t images, height, width, channels;
  int32_t steps, most;  // in all, and in one launch
  Optimizer optimizer;
  float rest1, beta2, rest2, eps, momentum;  // rest1, rest2: 1 − β1, 1 − β2
  float tv_weight, half_beta, root;          // tv_weight 0: the edge has it; root: what is added to the squares
  int32_t room;                              // bytes of shared memory that a block can have
};

constexpr int kManyRegisters = 256;  // threads of a block, at most: then each can have 255 registers
constexpr int kFinished = 2;

// Pixels of a thread, and what it knows of them: [row][channel].
template <int kChannels_, int kRows_>
struct Pixels {
  static constexpr int kChannels = kChannels_, kRows = kRows_;
  using Values = float[kRows][kChannels];
  Values gradient, first, second, largest;
  int row, column;  // of the first; a thread that has none is at column −1

  FASTINV_BLOCK void clear_moments() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) first[r][c] = second[r][c] = largest[r][c] = 0.0f;
    }
  }
};

// Planes of rows of pixels, each with as much of a border as the edge asks for.
struct Planes {
  float* first;  // pixel (0, 0) of channel 0, inside the border
  int pitch, size;

  FASTINV_BLOCK float& at(int row, int column, int channel) const {
    return first[channel * size + row * pitch + column];
  }
};

}  // namespace fastinv
