// An edge of two layers, convolution, ReLU, 2×2 max pool, convolution, ReLU: MNIST's ReLU2. All activations are on
// chip, and all products are of matrices, on tensor cores.
//
// A number is there the sum of two float16, high and low, and a product three: high · high + high · low + low · high
// (`halved`). All are multiplied by powers of two, from bounds of what can come, so that they stay in float16's range:
// those up to 2^19 times smaller than the bound keep all 22 bits.
#pragma once

#include "pooled_forward.h"

namespace fastinv {

template <int kImages_>
struct Pooled : PooledForward {
  using P = Pixels<1, 8>;
  static constexpr int kImages = kImages_;
  static constexpr bool kKeeps = false;
  static constexpr int kBorder = 0;
  static constexpr int kBlocks = 2, kMostThreads = kManyRegisters;
  static constexpr int kBackwardRows = 4;  // that a warp makes at once, at most

  struct Own {
    P pixels;
  };

  explicit Pooled(const PooledLayers& layers) : PooledForward{PooledMemory(layers)} {}

  FASTINV_BOTH int shared_floats(const Descent& d) const {
    return kWeights + ((3 + image_threads<Pooled>(d) / kWarp) * kImages + 3) / 4 * 4 +
           kImages * room_floats(halved_side(d.height), halved_side(d.width));
  }

  // work(warp, image, its rank among the warps that have the image): neighbours have different images, so that all four
  // parts of a multiprocessor are busy where an image has work for two.
  template <class Block, class F>
  FASTINV_BLOCK void each_rank(Block& block, F work) const {
    block.each_warp([&](const auto& warp) {
      const int image = warp.index() % kImages;
      if (images >> image & 1) work(warp, image, warp.index() / kImages);
    });
  }

  template <class Block>
  FASTINV_BLOCK void begin(const Descent& d, Block& block, float* memory) {
    height = halved_side(d.height), width = halved_side(d.width), rows = height - kEdge, columns = width - kEdge;
    pitch = pitch_of(width), all_pairs = d.height / 2 * pitch;
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
    ranks = block.threads() / kWarp / kImages;
    rooms = image_scale + ((3 + ranks) * kImages + 3) / 4 * 4;
    // The largest of these values of the image, to a place of the warp's.
    const auto bound = [&](const auto& warp, int image, int rank, const float* values, int count) {
      PerLane<float> most;
      warp.each([&](int lane) {
        most(lane) = 0.0f;
        for (int i = rank * kWarp + lane; i < count; i += ranks * kWarp) {
          most(lane) = fmaxf(most(lane), fabsf(values[i]));
        }
      });
      const float value = warp.largest([&](int lane) { return most(lane); });
      warp.each([&](int lane) {
        if (lane == 0) largest[image * ranks + rank] = value;
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
    each_rank(block, [&](const auto& warp, int image, int rank) {
      const float most = largest_of(warp, image);
      warp.each([&](int lane) {
        if (rank == 0 && lane == 0) target_bound[image] = most;
      });
    });
    each_rank(block, [&](const auto& warp, int image, int rank) {
      bound(warp, image, rank, d.z + int64_t{first_image + image} * pixels, pixels);
    });
    each_rank(block, [&](const auto& warp, int image, int rank) {
      // An image that has become 2^10 times as large, or 2^10 where it was below 1, is still below float16's 2^16.
      const float scale = scale_for(fmaxf(largest_of(warp, image), 1.0f), 6);
      warp.each([&](int lane) {
        if (rank == 0 && lane == 0) image_scale[image] = scale;
      });
    });
  }

  FASTINV_BLOCK void own(const Descent&, int, Own&) const {}

  FASTINV_BLOCK void moved(const Descent& d, int image, const P& p) const {
    if (p.column < 0) return;
    const float scale = image_scale[image];
    const float* z = &image_of<Pooled>(d, image_memory, image).at(p.row, p.column, 0);
    Halved* pairs = room(image).pairs + p.row / 2 * pitch + p.column;
#pragma unroll
    for (int r = 0; r < P::kRows; r += 2) {
      if (p.row + r >= d.height) break;
      pairs[r / 2 * pitch] = fastinv::halved(z[r * d.width] * scale, z[(r + 1) * d.width] * scale);
    }
  }

  template <class Block, class All>
  FASTINV_BLOCK void differentiate(const Descent&, Block& block, All& all) const {
    each_rank(block, [&](const auto& warp, int image, int rank) { first_layer(warp, image, rank); });
    each_rank(block, [&](const auto& warp, int image, int rank) { second_layer(warp, image, rank); });
    each_rank(block, [&](const auto& warp, int image, int rank) { back(warp, image, rank); });
    block.each([&](int thread) { gather(image_of_thread<Pooled>(thread), all[thread].pixels); });
  }

 private:
  // From there to what comes after the pool, of 16 columns and some rows at a time, and on to what was the largest and
  // to the pixels that it reaches. As many of the gradient's rows reach four rows at an end as two between: 10.
  template <class Warp>
  FASTINV_BLOCK void back(const Warp& warp, int image, int rank) const {
    const Room at = room(image);
    const int across = (width + 15) / 16, down = height < 8 ? 2 : (height - 4) / 2;
#pragma unroll 1
    for (int task = rank; task < down * across; task += ranks) {
      const int part = task / across, column = task % across * 16, row = part == 0 ? 0 : 2 * part + 2;
      PerLane<Sums> sums[kBackwardRows];
      int count = 4;
      if (part == 0) {
        reach<4, kEdge>(warp, at, row, column, sums);
      } else if (part + 1 == down) {
        reach<4, 0>(warp, at, row, column, sums);
        if (height - row < count) count = height - row;
      } else {
        reach<2, 0>(warp, at, row, column, sums);
        count = 2;
      }
      spread(warp, at, row, column, count, sums);
    }
  }

  // Sums of kCount rows from `row` on. Row row − kEdge + u of the gradient serves several of them; those at an end are
  // reached by the first four, or the last four, from kFirst on. A left factor's rows are 16 neighbouring columns.
  template <int kCount, int kFirst, class Warp>
  FASTINV_BLOCK void reach(const Warp& warp, const Room& at, int row, int column,
                           PerLane<Sums> (&sums)[kBackwardRows]) const {
    constexpr bool kEnds = kCount == 4;
    constexpr int kLast = kEnds ? kFirst + 4 : kCount + kEdge;
    const auto* factors = reinterpret_cast<const SplitRight*>(weights + kFirstWords + kSecondWords);
    const int plane = rows * (columns + 2);
    // Products of two rows would wait for each other; for sums apart of four there are no registers.
    PerLane<Sums> apart[kCount];
    const auto cross = [&](int r) -> PerLane<Sums>& { return kEnds ? sums[r] : apart[r]; };
    warp.each([&](int lane) {
#pragma unroll
      for (int r = 0; r < kCount; ++r) sums[r](lane) = cross(r)(lane) = {};
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
        source(lane) = at.gradient + lane / 16 * plane + (row - kEdge + kFirst) * (columns + 2) + 1 + x;
      });
      // The next row is on its way while this one is multiplied.
      PerLane<LeftFactor> high[2], low[2];
      const auto fetch = [&](int u) {
        warp.load([&](int lane) { return source(lane); }, high[u % 2]);
        warp.load([&](int lane) { return source(lane) + 2 * plane; }, low[u % 2]);
        warp.each([&](int lane) { source(lane) += columns + 2; });
      };
      fetch(kFirst);
#pragma unroll
      for (int u = kFirst; u < kLast; ++u) {
        if (u + 1 < kLast) fetch(u + 1);
        if (kEnds && u - kFirst >= rows) continue;
#pragma unroll
        for (int i = 0; i < kTaps; ++i) {
          const int r = u - kEdge + i;
          if (r < 0 || r >= kCount) continue;
          multiply_split(warp, sums[r], cross(r), high[u % 2], low[u % 2], w[i]);
        }
      }
    }
    if constexpr (!kEnds) {
#pragma unroll
      for (int r = 0; r < kCount; ++r) add(warp, sums[r], apart[r]);
    }
  }

  // A left factor's rows are windows, its columns 4 places in each of 4 channels, all but one of which are 0; a right
  // one's columns are 8 of the pixels reached.
  template <class Warp>
  FASTINV_BLOCK void spread(const Warp& warp, const Room& at, int row, int column, int count,
                            PerLane<Sums> (&sums)[kBackwardRows]) const {
    const auto* factors = reinterpret_cast<const SplitRight*>(weights + kFirstWords + kSecondWords + kSecondBackWords);
    PerLane<int[2]> to;
    PerLane<bool[2]> inside;
    warp.each([&](int lane) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int x = column + lane / 4 + 8 * i;
        inside(lane)[i] = x < width;
        to(lane)[i] = row * spread_pitch(width) + spread_at(x) + lane % 4 * 2;
      }
    });
#pragma unroll
    for (int r = 0; r < kBackwardRows; ++r) {
      if (r >= count) continue;
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
        for (int n = 0; n < kEights; ++n) {
          PerLane<SplitRight> w;
          warp.each([&](int lane) { w(lane) = factors[(2 * n + s) * kWarp + in_place(lane)]; });
          multiply_split(warp, reached[n], high[s], low[s], w);
        }
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

// visit(edge), and whether there is a kernel for images of this size: two a block, or one where two are too large.
template <class F>
bool with_edge(const Descent& d, const PooledLayers& layers, F&& visit) {
  const auto take = [&](const auto& edge) {
    if (!has_room(d, edge)) return false;
    visit(edge);
    return true;
  };
  const bool whole = d.channels == 1 && d.height % 4 == 0 && d.width % 4 == 0 && d.height >= 16 && d.width >= 16;
  return whole && (take(Pooled<2>(layers)) || take(Pooled<1>(layers)));
}

}  // namespace fastinv
