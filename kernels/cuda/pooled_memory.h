// What the edge of `pooled.h` has in shared memory, and what its kernel is told.
#pragma once

#include "descent.h"

namespace fastinv {

// Both convolutions' weights, and what bounds their results (fastinv/backends/cuda/pooled.py).
struct PooledLayers {
  const float* target;      // float32 [images, rows of the result, columns, kSecond]
  const uint32_t* weights;  // [kWeights]
  const float *first_bias, *second_bias;
  float first_scale, second_scale;  // powers of two by which the weights were multiplied
  // For z up to 1 the first layer is up to first_gain, a power of two; for activations up to 1 the second is up to
  // second_gain + second_offset; for its gradients up to 1 those of the first are up to back_gain, a power of two.
  float first_gain, second_gain, second_offset, back_gain;
};

// The power of two by which numbers up to bound are multiplied so that they are below 2^exponent.
FASTINV_BLOCK inline float scale_for(float bound, int exponent) {
  int size;
  frexpf(bound > 1e-18f ? bound : 1e-18f, &size);
  return ldexpf(1.0f, exponent - size);
}

// The low half of a word, moved up by so many bits; 0 from 32 bits on.
FASTINV_BLOCK inline uint32_t raised(uint32_t half, uint32_t bits) {
#ifdef __CUDACC__
  return __funnelshift_lc(0u, half & 0xffffu, bits);
#else
  return bits < 32 ? (half & 0xffffu) << bits : 0u;
#endif
}

struct PooledMemory {
  static constexpr int kTaps = 5, kFirst = 8, kSecond = 16;  // channels of the layers
  static constexpr int kEdge = kTaps - 1;                    // what a convolution takes away
  static constexpr int kPairs = (kTaps + 1) / 2;             // of column taps
  // Pixels of the image that a window of the pool reaches: kReach · kReach, in eights.
  static constexpr int kReach = kTaps + 1, kEights = (kReach * kReach + 7) / 8, kSpread = 8 * kEights;
  static constexpr int kNowhere = 64;
  // Words of the factors: of the first layer, of the second, and of their gradients.
  static constexpr int kFirstWords = 2 * 128, kSecondWords = kPairs * kTaps * 2 * 128;
  static constexpr int kSecondBackWords = kTaps * kTaps * 128, kFirstBackWords = kEights * 2 * 128;
  static constexpr int kWeights = kFirstWords + kSecondWords + kSecondBackWords + kFirstBackWords;

  // What an image has in shared memory, as `room` lays it out.
  struct Room {
    // Gradient of the second layer, [part, half of the channels, row, column] of 8 float16 each. A column of zeros on
    // either side stands for all that are outside.
    Words* gradient;
    unsigned char* place;  // 16 times which of four was the largest, or kNowhere: [row, column, channel]
    // What windows give to pixels that they reach, [row, column, kSpread] with gaps, see `spread_at`.
    float* spread;
    // Before there is any, in the same place: the image, [pair of rows, column], and what comes after the pool, [part,
    // row, column] of 8 float16. These take less than half: rows after the last can be read, too.
    Halved* pairs;
    Words* pooled;
  };

  PooledLayers layers;
  float to_pooled, to_gradient;                      // make sums what is multiplied next
  int height = 0, width = 0, rows = 0, columns = 0;  // after the pool; of the result
  int pitch = 0, all_pairs = 0;                      // columns of a pair of rows, of all
  int first_image = 0, images = 0;                   // the block's: the first, and a bit of each that runs
  int ranks = 0;                                     // warps that have an image
  const uint32_t* weights = nullptr;                 // in shared memory
  // Of each image: what its pixels are multiplied by, the largest |v|, what undoes the gradient's powers of two, and
  // the largest value after the pool, [image, rank].
  float *image_scale = nullptr, *target_bound = nullptr, *undo = nullptr, *largest = nullptr;
  float *image_memory = nullptr, *rooms = nullptr;

  explicit PooledMemory(const PooledLayers& given)
      : layers(given),
        to_pooled(1.0f / (given.first_scale * given.first_gain)),
        to_gradient(1.0f / (given.second_scale * given.back_gain)) {}

  FASTINV_BOTH static int halved_side(int side) { return (side - kEdge) / 2; }
  // Columns of a pair of rows, all that the last windows of a row read: 4 and some 8, so that 4 columns of three
  // neighbours are in different banks.
  FASTINV_BOTH static int pitch_of(int width) { return 8 * ((width + 3) / 4) + 4; }
  FASTINV_BOTH static int gradient_units(int height, int width) { return (height - kEdge) * (width - kEdge + 2); }
  FASTINV_BOTH static int room_floats(int height, int width) {
    return 16 * gradient_units(height, width) + height * width * (kFirst / 4) + height * spread_pitch(width);
  }

  // Of an image, what its warps left.
  template <class Warp>
  FASTINV_BLOCK float largest_of(const Warp& warp, int image) const {
    return warp.largest([&](int lane) { return lane < ranks ? largest[image * ranks + lane] : 0.0f; });
  }
  FASTINV_BLOCK Room room(int image) const {
    float* memory = rooms + image * room_floats(height, width);
    float* place = memory + 16 * gradient_units(height, width);
    float* spread = place + height * width * (kFirst / 4);
    auto* first = reinterpret_cast<Halved*>(spread);
    return {reinterpret_cast<Words*>(memory), reinterpret_cast<unsigned char*>(place), spread, first,
            reinterpret_cast<Words*>(first + all_pairs)};
  }
  // Where a window of a row begins: neither pairs of four windows nor a row of pixels share banks.
  FASTINV_BOTH static int spread_at(int column) { return column * kSpread + column / 4 * 2; }
  FASTINV_BOTH static int spread_pitch(int width) { return width * kSpread + (width + 3) / 4 * 2; }
};

}  // namespace fastinv
