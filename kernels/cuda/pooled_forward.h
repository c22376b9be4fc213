// Both layers of `pooled.h`, and the gradient of Σ(edge(z) − v)² before the last ReLU.
#pragma once

#include "pooled_memory.h"

namespace fastinv {

struct PooledForward : PooledMemory {
  static constexpr int kForwardRows = 2;  // that a warp makes at once

  // The pool of 4 columns of a row at a time, from 2 · 8 pixels of the convolution. A factor's rows are the channels'
  // weights, the high parts above the low ones, its columns pixels; 16 taps are in a row, pairs of two rows: four
  // columns of rows 0 and 1, of 2 and 3, of 4; the fifth column. All sums of a window are made in the same order, so
  // that equal ones stay equal.
  template <class Warp>
  FASTINV_BLOCK void first_layer(const Warp& warp, int image, int rank) const {
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
    const auto windows = [&](int column, PerLane<Source>& from, PerLane<Result>& to) {
      PerLane<Sums> sums[2][2];         // of the pixels' high and low parts, of the windows' upper and lower rows
      PerLane<RightFactor> x[2][2][2];  // [part, upper or lower][K step]
      warp.each([&](int lane) {
        const Halved *four = from(lane).four, *fifth = from(lane).fifth;
        const Halved a[3] = {four[0], four[pitch], four[2 * pitch]}, b[2] = {fifth[0], fifth[from(lane).below]};
        const auto put = [&](int half, uint32_t Halved::* of) {
          x[half][0][0](lane) = {{a[0].*of, a[1].*of}};
          x[half][0][1](lane) = {{a[2].*of, b[0].*of}};
          x[half][1][0](lane) = {{shifted(a[0].*of, a[1].*of), shifted(a[1].*of, a[2].*of)}};
          x[half][1][1](lane) = {{shifted(a[2].*of, 0), shifted(b[0].*of, b[1].*of)}};
        };
        put(0, &Halved::high);
        put(1, &Halved::low);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sums[0][r](lane) = {{bias(lane), bias(lane), 0.0f, 0.0f}};
          sums[1][r](lane) = {};
        }
      });
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < 2; ++r) warp.multiply(Float16{}, sums[half][r], w[s], x[half][r][s]);
        }
      }
      warp.each([&](int lane) {
        float best = 0.0f;
        int place = kNowhere;  // where none is above 0 no gradient goes back
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // of equal values the first is the largest, as in PyTorch
          const Sums &high = sums[0][k / 2](lane), &low = sums[1][k / 2](lane);
          const float value = high.at[k % 2] + (high.at[2 + k % 2] + low.at[k % 2]);
          if (value > best) {
            best = value;
            place = 16 * k;
          }
        }
        if (column + lane % 4 >= width) return;
        best *= to_pooled;
        most(lane) = fmaxf(most(lane), best);
        const Halved both = fastinv::halved(best, 0.0f);
        const Result& at = to(lane);
        at.pooled[0] = static_cast<uint16_t>(both.high);
        at.pooled[8 * height * width] = static_cast<uint16_t>(both.low);
        *at.place = static_cast<unsigned char>(place);
      });
    };
#pragma unroll 1
    for (int row = rank; row < height; row += ranks) {
      PerLane<Source> from;
      PerLane<Result> to;
      warp.each([&](int lane) {
        const int q = lane % 4, pixel = row * width + q;
        const Halved* first = at.pairs + row * pitch + lane / 4;
        // The fifth row's second number has no weight.
        from(lane) = {first + q, first + (q < 2 ? q : 2) * pitch + 4, q < 2 ? pitch : 0};
        to(lane) = {reinterpret_cast<uint16_t*>(at.pooled + pixel) + lane / 4, at.place + pixel * kFirst + lane / 4};
      });
#pragma unroll 1
      for (int column = 0; column < width; column += 4) {
        windows(column, from, to);
        warp.each([&](int lane) { from(lane).next(), to(lane).next(); });
      }
    }
    const float value = warp.largest([&](int lane) { return most(lane); });
    warp.each([&](int lane) {
      if (lane == 0) largest[image * ranks + rank] = value;
    });
  }
  // Where a lane finds pixels of four windows and leaves what it makes of them; and of the next four.
  struct Source {
    const Halved *four, *fifth;
    int below;

    FASTINV_BLOCK void next() { four += 8, fifth += 8; }
  };
  struct Result {
    uint16_t* pooled;
    unsigned char* place;

    FASTINV_BLOCK void next() { pooled += 4 * kFirst, place += 4 * kFirst; }
  };
  // The second number of a, the first of b.
  FASTINV_BLOCK static uint32_t shifted(uint32_t a, uint32_t b) { return a >> 16 | b << 16; }

  // The gradient before the last ReLU, 2 · (y − v) where y > 0, of 8 columns and `kForwardRows` rows at a time. A left
  // factor are the weights of two neighbouring taps, a right one 8 neighbouring pixels that serve several rows.
  template <class Warp>
  FASTINV_BLOCK void second_layer(const Warp& warp, int image, int rank) const {
    const int across = (columns + 7) / 8, tasks = (rows + kForwardRows - 1) / kForwardRows * across;
    if (rank >= tasks) return;
    const Room at = room(image);
    const float unit = image_scale[image] / layers.first_gain;  // of what comes after the pool
    const float bound = layers.second_gain * largest_of(warp, image) / unit + layers.second_offset;
    const float scale = scale_for(2.0f * (bound + target_bound[image]), 15);
    const float to_result = 1.0f / (layers.second_scale * unit);
    warp.each([&](int lane) {
      if (rank == 0 && lane == 0) undo[image] = layers.back_gain / (layers.first_scale * scale);
    });
    const auto* factors = reinterpret_cast<const LeftFactor*>(weights + kFirstWords);
#pragma unroll 1
    for (int task = rank; task < tasks; task += ranks) {
      const int row = task / across * kForwardRows, column = task % across * 8;
      PerLane<Sums> sums[kForwardRows], cross[kForwardRows];
      warp.each([&](int lane) {
#pragma unroll
        for (int r = 0; r < kForwardRows; ++r) sums[r](lane) = cross[r](lane) = {};
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
          PerLane<SplitPixels> x;
          warp.load([&](int lane) { return source(lane) + u * width; }, x);
#pragma unroll
          for (int i = 0; i < kTaps; ++i) {
            if (u - i < 0 || u - i >= kForwardRows) continue;
            multiply_split(warp, sums[u - i], cross[u - i], high[i], low[i], [&](int lane) { return x(lane).split(); });
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kForwardRows; ++r) add(warp, sums[r], cross[r]);
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

    FASTINV_BLOCK SplitRight split() const { return {{{at[0], at[1]}}, {{at[2], at[3]}}}; }
  };
};

}  // namespace fastinv
