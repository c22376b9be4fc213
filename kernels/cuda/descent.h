// rMLE by gradient descent, all steps on chip (He et al. 2019, Algorithm 1): what is the same for every edge.
//
// A block has one image, or a few, for many steps. They lie in shared memory, plane by plane, beside what the edge
// keeps there; a thread has some pixels of a column, one below the other, with their moments, in registers, or brings
// these for every step where registers are scarce. An edge says how the gradient of Σ(edge(z) − v)² is made:
// `quadratic.h`, `pooled.h`.
#pragma once

#include <type_traits>

#include "variation.h"

namespace fastinv {

// Steps taken when a launch ends that begins after so many.
FASTINV_BLOCK inline int end_of(const Descent& d, int begin) {
  return d.steps - begin < d.most ? d.steps : begin + d.most;
}

// Threads for a row of the image: whole warps where a block may have so many, so that a warp's rows are the same and it
// goes one way where an edge differs near the border.
template <class Edge>
FASTINV_BOTH int threads_across(const Descent& d) {
  const int whole = (d.width + 31) / 32 * 32, down = (d.height + Edge::P::kRows - 1) / Edge::P::kRows;
  return whole * down * Edge::kImages <= Edge::kMostThreads ? whole : d.width;
}
// Threads of an image, whole warps, and of a block; rows of an image, a whole number for each thread; floats of an
// image and of a block in shared memory.
template <class Edge>
FASTINV_BOTH int image_threads(const Descent& d) {
  return ((d.height + Edge::P::kRows - 1) / Edge::P::kRows * threads_across<Edge>(d) + 31) / 32 * 32;
}
template <class Edge>
FASTINV_BOTH int threads_of(const Descent& d) {
  return image_threads<Edge>(d) * Edge::kImages;
}
template <class Edge>
FASTINV_BOTH int rows_of(const Descent& d) {
  return (d.height + Edge::P::kRows - 1) / Edge::P::kRows * Edge::P::kRows + 2 * Edge::kBorder;
}
template <class Edge>
FASTINV_BOTH int image_floats(const Descent& d) {
  return (Edge::P::kChannels * rows_of<Edge>(d) * (d.width + 2 * Edge::kBorder) + 3) / 4 * 4;
}
template <class Edge>
FASTINV_BOTH int shared_floats(const Descent& d, const Edge& edge) {
  return Edge::kImages * image_floats<Edge>(d) + edge.shared_floats(d);
}
template <class Edge>
FASTINV_BOTH int blocks_of(const Descent& d) {
  return (d.images + Edge::kImages - 1) / Edge::kImages;
}
template <class Edge>
FASTINV_BLOCK Planes image_of(const Descent& d, float* memory, int image) {
  const int pitch = d.width + 2 * Edge::kBorder;
  memory += image * image_floats<Edge>(d);
  return {memory + Edge::kBorder * pitch + Edge::kBorder, pitch, rows_of<Edge>(d) * pitch};
}
// Which of its block's images a thread has: neighbouring warps have different ones.
template <class Edge>
FASTINV_BLOCK int image_of_thread(int thread) {
  return Edge::kImages == 1 ? 0 : static_cast<int>(in_place(static_cast<unsigned>(thread)) / kWarp % Edge::kImages);
}
// Whether there is such an image, and it has steps to take.
FASTINV_BLOCK inline bool runs(const Descent& d, int n) { return n < d.images && d.running[n] == 1; }
// Steps that those have taken that run of so many images from the first on; −1 where none runs.
template <int kImages>
FASTINV_BLOCK int begin_of(const Descent& d, int first) {
  int begin = -1;
#pragma unroll 1
  for (int i = 0; i < kImages; ++i) {
    if (runs(d, first + i)) begin = d.taken[first + i];
  }
  return begin;
}
// An image has taken its steps up to `end`.
FASTINV_BLOCK inline void arrive(const Descent& d, int n, int end) {
  d.taken[n] = end;
  if (end == d.steps) d.running[n] = kFinished;
}

// Sums of a convolution at the pixels of a thread: sum[r][c] += Σ w[i, j, k, c] · planes(row + r + i, column + j, k),
// with weights [j][k][i · outputs + c, rounded up to 4]. A value then serves several sums, and four weights are read at
// once. Rows that are not `kUniform` have weights of their own.
template <int kInputs, int kTaps, bool kUniform, int kRows, int kOutputs>
FASTINV_BLOCK void convolve(const Planes& planes, int row, int column, const Four* const (&weights)[kRows],
                            float (&sum)[kRows][kOutputs]) {
  constexpr int kFours = (kTaps * kOutputs + 3) / 4;
#pragma unroll 1
  for (int j = 0; j < kTaps; ++j) {
#pragma unroll(kInputs < 4 ? kInputs : 1)
    for (int k = 0; k < kInputs; ++k) {
      float x[kRows + kTaps - 1];
#pragma unroll
      for (int i = 0; i < kRows + kTaps - 1; ++i) x[i] = planes.at(row + i, column + j, k);
      const int place = (j * kInputs + k) * kFours;
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        Four w = weights[0][place + f];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (!kUniform && r > 0) w = weights[r][place + f];
#pragma unroll
          for (int l = 0; l < 4; ++l) {
            const int i = (4 * f + l) / kOutputs, c = (4 * f + l) % kOutputs;
            if (i < kTaps) sum[r][c] += w.at[l] * x[r + i];
          }
        }
      }
    }
  }
}

// What a step needs of memory, read once.
template <int kChannels>
struct Rule {
  float rate[2], low[kChannels], high[kChannels];

  FASTINV_BLOCK Rule(const Descent& d, int t) : rate{d.rates[2 * t], d.rates[2 * t + 1]} {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      low[c] = d.low == nullptr ? -INFINITY : d.low[c];
      high[c] = d.low == nullptr ? INFINITY : d.high[c];
    }
  }
};

// √x and x / y. On the GPU within 2 units in the last place, and what is below 1.2e-38 counts as 0: exact ones take
// five times the instructions, and branch.
FASTINV_BLOCK inline float root(float x) {
#ifdef __CUDA_ARCH__
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return sqrtf(x);
#endif
}
FASTINV_BLOCK inline float quotient(float x, float y) {
#ifdef __CUDA_ARCH__
  asm("div.approx.ftz.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
#else
  return x / y;
#endif
}

// z after a step, of this channel; with `kAdam` the optimizer is no other, and there is nothing to branch on. Adam:
// Kingma and Ba 2015; AMSGrad: Reddi et al. 2018; both and SGD as in PyTorch.
template <bool kAdam, int kChannels>
FASTINV_BLOCK float step(const Descent& d, const Rule<kChannels>& rule, int channel, float z, float gradient,
                         float& first, float& second, float& largest) {
  if (!kAdam && d.optimizer == Optimizer::kSgd) {
    first = d.momentum * first + gradient;
    z -= rule.rate[0] * first;
  } else {
    first += d.rest1 * (gradient - first);
    second = d.beta2 * second + d.rest2 * gradient * gradient;
    float scale = second;
    if (!kAdam && d.optimizer == Optimizer::kAmsgrad) {
      if (largest > scale) scale = largest;
      largest = scale;
    }
    z -= quotient(rule.rate[0] * first, root(scale) * rule.rate[1] + d.eps);
  }
  if (z < rule.low[channel]) z = rule.low[channel];
  if (z > rule.high[channel]) z = rule.high[channel];
  return z;
}

// What a block does with its images: as many steps as are left, `most` at most. The edge has
// - `kImages`, of a block; `kBorder`, of an image; `kMostThreads` of a block; `kBlocks`, that share a multiprocessor;
//   `kKeeps`, whether moments stay in registers;
// - `Own`, what a thread keeps beside its pixels, a `Pixels` among it as `pixels`;
// - `shared_floats(d)`, and `begin(d, block, memory)`, which fills that memory and ends with a barrier;
// - `own(d, n, own)`, which completes a thread's own for image n, and `moved(d, image, pixels)`, told of new values;
// - `differentiate(d, block, all)`, which leaves the gradients in the pixels of all, and ends with a barrier.
template <class Edge, class Block>
FASTINV_BLOCK void descend(const Descent& d, Edge edge, Block& block) {
  using P = typename Edge::P;
  const int across = threads_across<Edge>(d), first = block.index() * Edge::kImages;
  const int begin = begin_of<Edge::kImages>(d, first);
  if (begin < 0) return;
  const int end = end_of(d, begin);
  typename Block::template PerThread<typename Edge::Own> all(block);

  // For every value of a thread that is in its image: f(row in the thread, channel).
  const auto values = [&](const P& p, auto f) {
    if (p.column < 0) return;
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      if (p.row + r >= d.height) continue;
#pragma unroll
      for (int c = 0; c < P::kChannels; ++c) f(r, c);
    }
  };
  // The same with its place in memory, which goes from row to row: that takes fewer 64-bit products.
  const auto places = [&](int image, const P& p, float* images, auto f) {
    if (p.column < 0) return;
    float* row = images + ((int64_t{first + image} * d.height + p.row) * d.width + p.column) * P::kChannels;
    values(p, [&](int r, int c) {
      f(r, c, row[c]);
      if (c + 1 == P::kChannels) row += d.width * P::kChannels;
    });
  };
  const auto load = [&](int image, const P& p, float* from, typename P::Values& to) {
    places(image, p, from, [&](int r, int c, float value) { to[r][c] = value; });
  };
  const auto store = [&](int image, const P& p, const typename P::Values& from, float* to) {
    places(image, p, to, [&](int r, int c, float& value) { value = from[r][c]; });
  };
  const bool squares = d.optimizer != Optimizer::kSgd, largest = d.optimizer == Optimizer::kAmsgrad;
  const auto load_moments = [&](int image, P& p) {
    p.clear_moments();  // also those that are not loaded: nothing has to be kept from the step before
    load(image, p, d.first, p.first);
    if (squares) load(image, p, d.second, p.second);
    if (largest) load(image, p, d.largest, p.largest);
  };
  const auto store_moments = [&](int image, const P& p) {
    store(image, p, p.first, d.first);
    if (squares) store(image, p, p.second, d.second);
    if (largest) store(image, p, p.largest, d.largest);
  };

  block.each([&](int thread) {
    for (int i = thread; i < Edge::kImages * image_floats<Edge>(d); i += block.threads()) block.shared()[i] = 0.0f;
  });
  edge.begin(d, block, block.shared() + Edge::kImages * image_floats<Edge>(d));
  block.each([&](int thread) {
    all[thread] = {};
    P& p = all[thread].pixels;
    const int image = image_of_thread<Edge>(thread), place = thread / kWarp / Edge::kImages * kWarp + thread % kWarp;
    p.row = place / across * P::kRows;
    p.column = p.row < d.height && place % across < d.width && runs(d, first + image) ? place % across : -1;
    if (p.column < 0) return;
    const Planes planes = image_of<Edge>(d, block.shared(), image);
    places(image, p, d.z, [&](int r, int c, float z) { planes.at(p.row + r, p.column, c) = z; });
    if (Edge::kKeeps) load_moments(image, p);
    edge.own(d, first + image, all[thread]);
    edge.moved(d, image, p);
  });
  for (int t = begin; t < end; ++t) {
    edge.differentiate(d, block, all);
    if (d.tv_weight > 0.0f || !Edge::kKeeps) {
      block.each([&](int thread) {
        P& p = all[thread].pixels;
        const int image = image_of_thread<Edge>(thread);
        if (!Edge::kKeeps) load_moments(image, p);
        if (d.tv_weight == 0.0f) return;
        const Planes planes = image_of<Edge>(d, block.shared(), image);
        with_power(d, [&](auto power) {
          if (p.column >= 0) add_variation<decltype(power)::value>(d, planes, p);
        });
      });
    }
    block.each([&](int thread) {
      P& p = all[thread].pixels;
      p.row = in_place(p.row), p.column = in_place(p.column);
      const int image = image_of_thread<Edge>(thread);
      const Planes planes = image_of<Edge>(d, block.shared(), image);
      const Rule<P::kChannels> rule(d, t);
      const auto advance = [&](auto adam) {
        values(p, [&](int r, int c) {
          float& z = planes.at(p.row + r, p.column, c);
          z = step<decltype(adam)::value>(d, rule, c, z, p.gradient[r][c], p.first[r][c], p.second[r][c],
                                          p.largest[r][c]);
        });
      };
      d.optimizer == Optimizer::kAdam ? advance(std::true_type()) : advance(std::false_type());
      if (!Edge::kKeeps) store_moments(image, p);
      edge.moved(d, image, p);
    });
  }
  block.each([&](int thread) {
    const P& p = all[thread].pixels;
    const int image = image_of_thread<Edge>(thread);
    const Planes planes = image_of<Edge>(d, block.shared(), image);
    places(image, p, d.z, [&](int r, int c, float& z) { z = planes.at(p.row + r, p.column, c); });
    if (Edge::kKeeps) store_moments(image, p);
    if (p.row > 0 || p.column != 0) return;  // one thread of an image that runs
    arrive(d, first + image, end);
  });
}

// How a kernel is launched: blocks, their threads and floats of shared memory.
struct Grid {
  int blocks, threads, floats;
};
template <class Edge>
Grid grid_of(const Descent& d, const Edge& edge) {
  return {blocks_of<Edge>(d), threads_of<Edge>(d), shared_floats(d, edge)};
}

template <class Edge>
bool has_room(const Descent& d, const Edge& edge) {
  const Grid grid = grid_of(d, edge);
  return grid.threads <= Edge::kMostThreads && int64_t{grid.floats} * 4 <= d.room;
}

}  // namespace fastinv
