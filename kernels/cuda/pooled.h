// An edge of two layers, convolution, ReLU, 2×2 max pool, convolution, ReLU: MNIST's ReLU2. All activations are on
// chip, and all products are of matrices, on tensor cores.
//
// A number is there the sum of two float16, high and low, and a product three: high · high + high · low + low · high
// (`halved`). All are multiplied by powers of two, from bounds of what can come, so that they stay in float16's range:
// those up to 2^19 times smaller than the bound keep all 22 bits.
#pragma once

#include "descent.h"

namespace fastinv {

// Both convolutions' weights, and what bounds their results (fastinv/backends/cuda_pooled.py).
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

template <int kImages_>
struct Pooled {
  using P = Pixels<1, 8>;
  static constexpr int kTaps = 5, kFirst = 8, kSecond = 16;  // channels of the layers
  static constexpr int kImages = kImages_;
  static constexpr bool kKeeps = false;
  static constexpr int kBorder = 0;
  static constexpr int kBlocks = 2;
  static constexpr int kEdge = kTaps - 1;                    // what a convolution takes away
  static constexpr int kPairs = (kTaps + 1) / 2;             // of column taps
  static constexpr int kForwardRows = 4, kBackwardRows = 6;  // that a warp makes at once
  // Pixels of the image that a window of the pool reaches: kReach · kReach, in eights.
  static constexpr int kReach = kTaps + 1, kEights = (kReach * kReach + 7) / 8, kSpread = 8 * kEights;
  static constexpr int kNowhere = 64;
  // Words of the factors: of the first layer, of the second, and of their gradients.
  static constexpr int kFirstWords = 2 * 128, kSecondWords = kPairs * kTaps * 2 * 128;
  static constexpr int kSecondBackWords = kTaps * kTaps * 128, kFirstBackWords = kEights * 2 * 128;
  static constexpr int kWeights = kFirstWords + kSecondWords + kSecondBackWords + kFirstBackWords;

  struct Own {
    P pixels;
  };

  // What an image has in shared memory, as `room` lays it out.
  struct Room {
    // Gradient of the second layer, [part, half of the channels, row, column] of 8 float16 each. A column of zeros on
    // either side stands for all that are outside.
    Words* gradient;
    unsigned char* place;  // 16 times which of four was the largest, or kNowhere: [row, column, channel]
    // What windows give to pixels that they reach, [row, column, kSpread] with gaps, see `spread_at`.
    float* spread;
    // Before there is any, in the same place: the image as float16, [part, pair of rows, column], and what comes after
    // the pool, [part, row, column] of 8 float16.
    uint32_t* pairs;
    Words* pooled;
  };

  PooledLayers layers;
  float to_pooled, to_gradient;                      // what makes sums what is multiplied next
  int height = 0, width = 0, rows = 0, columns = 0;  // after the pool; of the result
  int pitch = 0, part = 0;                           // words of a pair of rows, of all
  int first_image = 0, images = 0;                   // the block's
  const uint32_t* weights = nullptr;                 // in shared memory
  float *image_scale = nullptr, *target_bound = nullptr, *undo = nullptr, *largest = nullptr;
  float *image_memory = nullptr, *rooms = nullptr;

  FASTINV_BOTH static int halved_side(int side) { return (side - kEdge) / 2; }
  // Pairs of three neighbouring rows are in other banks for 8 columns.
  FASTINV_BOTH static int pitch_of(const Descent& d) { return (d.width + 7) / 16 * 16 + 8; }
  FASTINV_BOTH static int gradient_units(int height, int width) { return (height - kEdge) * (width - kEdge + 2); }
  FASTINV_BOTH static int room_floats(int height, int width) {
    return 16 * gradient_units(height, width) + height * width * (kFirst / 4) + height * spread_pitch(width);
  }
  FASTINV_BOTH int shared_floats(const Descent& d) const {
    const int warps = threads_of<Pooled>(d) / kWarp;
    return kWeights + (3 * kImages + warps + 3) / 4 * 4 +
           kImages * room_floats(halved_side(d.height), halved_side(d.width));
  }

  FASTINV_BLOCK Room room(int image) const {
    float* memory = rooms + image * room_floats(height, width);
    float* place = memory + 16 * gradient_units(height, width);
    float* spread = place + height * width * (kFirst / 4);
    auto* pairs = reinterpret_cast<uint32_t*>(spread);
    return {reinterpret_cast<Words*>(memory), reinterpret_cast<unsigned char*>(place), spread, pairs,
            reinterpret_cast<Words*>(pairs + 2 * part)};
  }
  // Where a window of a row begins: neither pairs of four windows nor a row of pixels share banks.
  FASTINV_BOTH static int spread_at(int column) { return column * kSpread + column / 4 * 2; }
  FASTINV_BOTH static int spread_pitch(int width) { return width * kSpread + (width + 3) / 4 * 2; }

  // work(warp, image, its rank among the warps that have the image): neighbours have different images, so that all four
  // parts of a multiprocessor are busy where an image has work for two.
  template <class Block, class F>
  FASTINV_BLOCK void each_rank(Block& block, F work) const {
    block.each_warp([&](const auto& warp) {
      const int index = in_place(warp.index()), image = image_of_thread<Pooled>(index * kWarp);
      if (images >> image & 1) work(warp, image, index / kImages);
    });
  }

  template <class Block>
  FASTINV_BLOCK void begin(const Descent& d, Block& block, float* memory) {
    height = halved_side(d.height), width = halved_side(d.width), rows = height - kEdge, columns = width - kEdge;
    pitch = pitch_of(d), part = d.height / 2 * pitch;
    first_image = block.index() * kImages;
#pragma unroll
    for (int i = 0; i < kImages; ++i) images |= runs(d, first_image + i) << i;
    image_memory = block.shared();
    auto* words = reinterpret_cast<uint32_t*>(memory);
    weights = words;
    image_scale = memory + kWeights;
    target_bound = image_scale + kImages;
    undo = target_bound + kImages;
    largest = undo + kImages;
    const int warps = block.threads() / kWarp;
    rooms = image_scale + (3 * kImages + warps + 3) / 4 * 4;
    // The largest of these values of the image, to a place of the warp's.
    const auto bound = [&](const auto& warp, int image, int rank, const float* values, int count) {
      PerLane<float> most;
      warp.each([&](int lane) {
        most(lane) = 0.0f;
        for (int i = rank * kWarp + lane; i < count; i += warps / kImages * kWarp) {
          most(lane) = fmaxf(most(lane), fabsf(values[i]));
        }
      });
      const float value = warp.largest([&](int lane) { return most(lane); });
      warp.each([&](int lane) {
        if (lane == 0) largest[rank * kImages + image] = value;
      });
    };
    const int pixels = d.height * d.width, results = rows * columns * kSecond;
    block.each([&](int thread) {
      for (int i = thread; i < kWeights; i += block.threads()) words[i] = layers.weights[i];
      for (int i = thread; i < kImages * room_floats(height, width); i += block.threads()) rooms[i] = 0.0f;
    });
    each_rank(block, [&](const auto& warp, int image, int rank) {
      bound(warp, image, rank, layers.target + int64_t{first_image + image} * results, results);
    });
    block.each([&](int thread) {
      if (thread < kImages) target_bound[thread] = largest_of(thread, warps);
    });
    each_rank(block, [&](const auto& warp, int image, int rank) {
      bound(warp, image, rank, d.z + int64_t{first_image + image} * pixels, pixels);
    });
    block.each([&](int thread) {
      // An image that has become 2^10 times as large, or 2^10 where it was below 1, is still below float16's 2^16.
      if (thread < kImages) image_scale[thread] = scale_for(fmaxf(largest_of(thread, warps), 1.0f), 6);
    });
  }

  FASTINV_BLOCK void own(const Descent&, int, Own&) const {}

  FASTINV_BLOCK void moved(const Descent& d, int image, const P& p) const {
    if (p.column < 0) return;
    const float scale = image_scale[image];
    const float* z = &image_of<Pooled>(d, image_memory, image).at(p.row, p.column, 0);
    uint32_t* pairs = room(image).pairs + p.row / 2 * pitch + p.column;
#pragma unroll
    for (int r = 0; r < P::kRows; r += 2) {
      if (p.row + r >= d.height) break;
      const Halved both = fastinv::halved(z[r * d.width] * scale, z[(r + 1) * d.width] * scale);
      pairs[r / 2 * pitch] = both.high;
      pairs[r / 2 * pitch + part] = both.low;
    }
  }

  template <class Block, class All>
  FASTINV_BLOCK void differentiate(const Descent& d, Block& block, All& all) const {
    const int warps = block.threads() / kWarp;
    each_rank(block, [&](const auto& warp, int image, int rank) {
      first_layer(warp, image, rank, warps / kImages, d.width - 1);
    });
    each_rank(block, [&](const auto& warp, int image, int rank) { second_layer(warp, image, rank, warps); });
    each_rank(block, [&](const auto& warp, int image, int rank) { back(warp, image, rank, warps / kImages); });
    block.each([&](int thread) { gather(image_of_thread<Pooled>(thread), all[thread].pixels); });
  }

 private:
  FASTINV_BLOCK float largest_of(int image, int warps) const {
    float result = 0.0f;
    for (int w = image; w < warps; w += kImages) result = fmaxf(result, largest[w]);
    return result;
  }

  // The pool of 4 columns of a row at a time, from 2 · 8 pixels of the convolution. A factor's rows are the channels'
  // weights, the high parts above the low ones, its columns pixels; 16 taps are in a row, pairs of two rows: four
  // columns of rows 0 and 1, of 2 and 3, of 4; the fifth column. All sums of a window are made in the same order, so
  // that equal ones stay equal.
  template <class Warp>
  FASTINV_BLOCK void first_layer(const Warp& warp, int image, int rank, int warps, int last_column) const {
    const Room at = room(image);
    const float scale = layers.first_scale * image_scale[image];
    PerLane<LeftFactor> w[2];
    PerLane<float> bias, most;
    warp.each([&](int lane) {
#pragma unroll
      for (int s = 0; s < 2; ++s) w[s](lane) = reinterpret_cast<const LeftFactor*>(weights)[s * kWarp + lane];
      bias(lane) = layers.first_bias[lane / 4] * scale;
      most(lane) = 0.0f;
    });
    const auto windows = [&](int row, int column) {
      PerLane<Sums> sums[2][2];  // of the pixels' high and low parts, of the windows' upper and lower rows
      warp.each([&](int lane) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sums[0][r](lane) = {{bias(lane), bias(lane), 0.0f, 0.0f}};
          sums[1][r](lane) = {};
        }
      });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PerLane<RightFactor> x[2][2];  // [upper, lower][K step]
        warp.each([&](int lane) {
          const int q = lane % 4, c = 2 * column + lane / 4, low = q < 2 ? q : 2;
          const uint32_t* rows_at = at.pairs + half * part + row * pitch;
          const uint32_t* four = rows_at + (c + q < last_column ? c + q : last_column);
          const uint32_t* fifth = rows_at + low * pitch + (c + 4 < last_column ? c + 4 : last_column);
          const uint32_t a[3] = {four[0], four[pitch], four[2 * pitch]};
          const uint32_t b[2] = {fifth[0], fifth[q < 2 ? pitch : 0]};  // row 5 has no weight
          x[0][0](lane) = {{a[0], a[1]}};
          x[0][1](lane) = {{a[2], b[0]}};
          x[1][0](lane) = {{shifted(a[0], a[1]), shifted(a[1], a[2])}};
          x[1][1](lane) = {{shifted(a[2], 0), shifted(b[0], b[1])}};
        });
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
          for (int r = 0; r < 2; ++r) warp.multiply(sums[half][r], w[s], x[r][s]);
        }
      }
      warp.each([&](int lane) {
        float best = 0.0f;
        int place = kNowhere;  // where none is above 0 no gradient goes back
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // of equal values the first is the largest, as in PyTorch
          const Sums &high = sums[0][k / 2](lane), &low = sums[1][k / 2](lane);
          const float value = high.at[k % 2] + (high.at[2 + k % 2] + low.at[k % 2] + low.at[2 + k % 2]);
          if (value > best) {
            best = value;
            place = 16 * k;
          }
        }
        const int x = column + lane % 4, pixel = row * width + x;
        if (x >= width) return;
        best *= to_pooled;
        most(lane) = fmaxf(most(lane), best);
        const Halved both = fastinv::halved(best, 0.0f);
        auto* pooled = reinterpret_cast<uint16_t*>(at.pooled + pixel) + lane / 4;
        pooled[0] = static_cast<uint16_t>(both.high);
        pooled[8 * height * width] = static_cast<uint16_t>(both.low);
        at.place[pixel * kFirst + lane / 4] = static_cast<unsigned char>(place);
      });
    };
#pragma unroll 1
    for (int row = rank; row < height; row += warps) {
#pragma unroll 1
      for (int column = 0; column < width; column += 4) windows(row, column);
    }
    const float value = warp.largest([&](int lane) { return most(lane); });
    warp.each([&](int lane) {
      if (lane == 0) largest[rank * kImages + image] = value;
    });
  }
  // The second number of a, the first of b.
  FASTINV_BLOCK static uint32_t shifted(uint32_t a, uint32_t b) { return a >> 16 | b << 16; }

  // The gradient before the last ReLU, 2 · (y − v) where y > 0, of 8 columns and `kForwardRows` rows at a time. A left
  // factor are the weights of two neighbouring taps, a right one 8 neighbouring pixels that serve several rows.
  template <class Warp>
  FASTINV_BLOCK void second_layer(const Warp& warp, int image, int rank, int warps) const {
    const Room at = room(image);
    const float unit = image_scale[image] / layers.first_gain;  // of what comes after the pool
    const float bound = layers.second_gain * largest_of(image, warps) / unit + layers.second_offset;
    const float scale = scale_for(2.0f * (bound + target_bound[image]), 15);
    const float to_result = 1.0f / (layers.second_scale * unit);
    warp.each([&](int lane) {
      if (rank == 0 && lane == 0) undo[image] = layers.back_gain / (layers.first_scale * scale);
    });
    const auto* factors = reinterpret_cast<const LeftFactor*>(weights + kFirstWords);
    const int across = (columns + 7) / 8, down = (rows + kForwardRows - 1) / kForwardRows;
#pragma unroll 1
    for (int task = rank; task < down * across; task += warps / kImages) {
      const int row = task / across * kForwardRows, column = task % across * 8;
      PerLane<Sums> sums[kForwardRows];
      warp.each([&](int lane) {
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r) sums[r](lane) = {};
      });
#pragma unroll 1
      for (int pair = 0; pair < kPairs; ++pair) {
        PerLane<LeftFactor> high[kTaps], low[kTaps];
        PerLane<const Words*> source;
        warp.each([&](int lane) {
#pragma unroll
          for (int i = 0; i < kTaps; ++i) {
            high[i](lane) = factors[(pair * kTaps + i) * 2 * kWarp + lane];
            low[i](lane) = factors[((pair * kTaps + i) * 2 + 1) * kWarp + lane];
          }
          const int x = column + lane % 8 + 2 * pair + lane / 8 % 2;
          source(lane) = at.pooled + (lane / 16 * height + row) * width + (x < width ? x : width - 1);
        });
#pragma unroll
        for (int u = 0; u < kForwardRows + kEdge; ++u) {
          if (row + u >= height) continue;
          PerLane<SplitPixels> x;
          warp.load([&](int lane) { return source(lane) + u * width; }, x);
#pragma unroll
          for (int i = 0; i < kTaps; ++i) {
            if (u - i < 0 || u - i >= kForwardRows) continue;
            PerLane<Sums>& sum = sums[u - i];
            warp.multiply(sum, high[i], [&](int lane) { return x(lane).high(); });
            warp.multiply(sum, high[i], [&](int lane) { return x(lane).low(); });
            warp.multiply(sum, low[i], [&](int lane) { return x(lane).high(); });
          }
        }
      }
      warp.each([&](int lane) {
        const int plane = rows * (columns + 2);
        const float* target = layers.target + int64_t{first_image + image} * rows * columns * kSecond;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of the channels
          const int channel = lane / 4 + 8 * half;
          const float bias = layers.second_bias[channel];
          auto* gradient = reinterpret_cast<uint16_t*>(at.gradient + half * plane) + lane / 4;
#pragma unroll
          for (int r = 0; r < kForwardRows; ++r) {
            const int y = row + r, x = column + lane % 4 * 2;
            float g[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float value = sums[r](lane).at[2 * half + e] * to_result + bias;
              const bool inside = y < rows && x + e < columns;
              const float v = inside ? target[(y * columns + x + e) * kSecond + channel] : 0.0f;
              g[e] = value > 0.0f ? 2.0f * scale * (value - v) : 0.0f;
            }
            const Halved both = fastinv::halved(g[0], g[1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (y >= rows || x + e >= columns) continue;
              uint16_t* to = gradient + 8 * (y * (columns + 2) + 1 + x + e);
              to[0] = static_cast<uint16_t>(both.high >> 16 * e);
              to[16 * plane] = static_cast<uint16_t>(both.low >> 16 * e);
            }
          }
        }
      });
    }
  }
  // Two right factors as `load` brings them: the high and the low parts.
  struct SplitPixels {
    uint32_t at[4];

    FASTINV_BLOCK RightFactor high() const { return {{at[0], at[1]}}; }
    FASTINV_BLOCK RightFactor low() const { return {{at[2], at[3]}}; }
  };

  // From there to what comes after the pool, of 16 columns and `kBackwardRows` rows at a time, and on to what was the
  // largest and to the pixels that it reaches. A left factor's rows are 16 neighbouring columns; one of the gradient's
  // rows serves several.
  template <class Warp>
  FASTINV_BLOCK void back(const Warp& warp, int image, int rank, int warps) const {
    const Room at = room(image);
    const auto* factors = reinterpret_cast<const SplitRight*>(weights + kFirstWords + kSecondWords);
    const int across = (width + 15) / 16, down = (height + kBackwardRows - 1) / kBackwardRows;
    const int plane = rows * (columns + 2);
#pragma unroll 1
    for (int task = rank; task < down * across; task += warps) {
      const int row = task / across * kBackwardRows, column = task % across * 16;
      PerLane<Sums> sums[kBackwardRows];
      warp.each([&](int lane) {
#pragma unroll
        for (int r = 0; r < kBackwardRows; ++r) sums[r](lane) = {};
      });
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
        PerLane<SplitRight> w[kTaps];
        PerLane<const Words*> source;
        warp.each([&](int lane) {
#pragma unroll
          for (int i = 0; i < kTaps; ++i) w[i](lane) = factors[(tap * kTaps + i) * kWarp + lane];
          int x = column + lane % 16 - tap;
          x = x < -1 ? -1 : x > columns ? columns : x;
          source(lane) = at.gradient + lane / 16 * plane + (row - kEdge) * (columns + 2) + 1 + x;
        });
#pragma unroll
        for (int u = 0; u < kBackwardRows + kEdge; ++u) {
          if (row - kEdge + u < 0 || row - kEdge + u >= rows) continue;
          PerLane<LeftFactor> high, low;
          warp.load([&](int lane) { return source(lane) + u * (columns + 2); }, high);
          warp.load([&](int lane) { return source(lane) + u * (columns + 2) + 2 * plane; }, low);
#pragma unroll
          for (int i = 0; i < kTaps; ++i) {
            if (u - kEdge + i < 0 || u - kEdge + i >= kBackwardRows) continue;
            multiply_split(warp, sums[u - kEdge + i], high, low, w[i]);
          }
        }
      }
      spread(warp, at, row, column, sums);
    }
  }

  template <class Warp>
  FASTINV_BLOCK static void multiply_split(const Warp& warp, PerLane<Sums>& sums, PerLane<LeftFactor>& high,
                                           PerLane<LeftFactor>& low, PerLane<SplitRight>& right) {
    warp.multiply(sums, high, [&](int lane) { return right(lane).high; });
    warp.multiply(sums, high, [&](int lane) { return right(lane).low; });
    warp.multiply(sums, low, [&](int lane) { return right(lane).high; });
  }

  // A left factor's rows are windows, its columns 4 places in each of 4 channels, all but one of which are 0; a right
  // one's columns are 8 of the pixels reached.
  template <class Warp>
  FASTINV_BLOCK void spread(const Warp& warp, const Room& at, int row, int column,
                            PerLane<Sums> (&sums)[kBackwardRows]) const {
    const auto* factors =
        reinterpret_cast<const SplitRight*>(weights + kFirstWords + kSecondWords + kSecondBackWords);
    PerLane<SplitRight> w[kEights][2];
    PerLane<int[2]> to;
    PerLane<bool[2]> inside;
    warp.each([&](int lane) {
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
#pragma unroll
        for (int s = 0; s < 2; ++s) w[n][s](lane) = factors[(2 * n + s) * kWarp + lane];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int x = column + lane / 4 + 8 * i;
        inside(lane)[i] = x < width;
        to(lane)[i] = row * spread_pitch(width) + spread_at(x) + lane % 4 * 2;
      }
    });
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      if (row + r >= height) continue;
      PerLane<LeftFactor> high[2], low[2];
      warp.each([&](int lane) {
        const Sums& sum = sums[r](lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int x = column + lane / 4 + 8 * i;
          const unsigned char* place = at.place + ((row + r) * width + x) * kFirst + lane % 4 * 2;
          const Halved both = fastinv::halved(sum.at[2 * i] * to_gradient, sum.at[2 * i + 1] * to_gradient);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const uint32_t bits = inside(lane)[i] ? place[s] : kNowhere;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              high[s](lane).at[2 * j + i] = raised(both.high >> 16 * s, bits - 32 * j);
              low[s](lane).at[2 * j + i] = raised(both.low >> 16 * s, bits - 32 * j);
            }
          }
        }
      });
      PerLane<Sums> reached[kEights];
      warp.each([&](int lane) {
#pragma unroll
        for (int n = 0; n < kEights; ++n) reached[n](lane) = {};
      });
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int n = 0; n < kEights; ++n) multiply_split(warp, reached[n], high[s], low[s], w[n][s]);
      }
      warp.each([&](int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!inside(lane)[i]) continue;
          float* at_row = at.spread + to(lane)[i] + r * spread_pitch(width);
#pragma unroll
          for (int n = 0; n < kEights; ++n) {
            const Sums& sum = reached[n](lane);
            *reinterpret_cast<Two*>(at_row + 8 * n) = {{sum.at[2 * i], sum.at[2 * i + 1]}};
          }
        }
      });
    }
  }
  struct alignas(8) Two {
    float at[2];
  };

  // The sums at a thread's pixels: each is reached by up to 3 · 3 windows.
  FASTINV_BLOCK void gather(int image, P& p) const {
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) p.gradient[r][0] = 0.0f;
    if (p.column < 0) return;
    float sum[P::kRows] = {};
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int x = p.column / 2 - j;
      if (x < 0 || x >= width) continue;
      const float* windows = room(image).spread + spread_at(x) + p.column % 2;
#pragma unroll
      for (int i = -2; i < P::kRows / 2; ++i) {
        const int y = p.row / 2 + i;
        if (y < 0 || y >= height) continue;
        const float* window = windows + y * spread_pitch(width);
#pragma unroll
        for (int r = 0; r < P::kRows; ++r) {
          if (r >= 2 * i && r < 2 * i + kReach) sum[r] += window[(r - 2 * i) * kReach + 2 * j];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) p.gradient[r][0] = sum[r] * undo[image];
  }
};

// visit(edge), and whether there is a kernel for images of this size.
template <class F>
bool with_edge(const Descent& d, const PooledLayers& layers, F&& visit) {
  using Edge = Pooled<2>;
  const Edge edge{layers, 1.0f / (layers.first_scale * layers.first_gain),
                  1.0f / (layers.second_scale * layers.back_gain)};
  const bool whole = d.channels == 1 && d.height % 4 == 0 && d.width % 4 == 0 && d.height >= 16 && d.width >= 16;
  if (!whole || !has_room(d, edge)) return false;
  visit(edge);
  return true;
}

}  // namespace fastinv
