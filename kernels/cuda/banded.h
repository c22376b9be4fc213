// `quadratic.h`'s steps on tensor cores.
//
// The columns of a row of H·z are made from rows of z by bands: eight of them are reached from sixteen, those and four
// to each side. So sixteen columns of sixteen rows are a left factor, and a band a right one. Both are float32 in two
// halves of float16, of which three of four products count. What the sixteen rows are is a layout's business:
// `banded_images.h`, `banded_rows.h`.
#pragma once

#include "descent.h"

namespace fastinv {

struct BandedForm {
  const float* constant;  // c: float32 [images, height, width, channels]
  // Right factors, each 32 lanes' high words and low words, [kind of eight columns][factor]; weights are multiplied by
  // `scale`.
  const uint32_t* weights;
  const int32_t* kind;   // [width / 8, rounded up]
  const int32_t* first;  // [height], the number of a row's first tap in `weights`; null for several channels
  int32_t taps, factors, kinds;
  float scale, unscale;  // one is 1 / the other
};

// What all layouts share: 16 warps, and the pitch of a row of columns in halves, 80 bytes, which is without bank
// conflicts.
namespace band {
constexpr int kThreads = 16 * kWarp, kColumns = 8, kReach = 4, kAcross = 4;
constexpr int kMostWidth = kAcross * kColumns, kPitch = kMostWidth + 2 * kReach;
constexpr int kFactor = 4 * kWarp;  // words

// A thread's first column, the second is next to it; and the kind of the eight columns around.
FASTINV_BLOCK inline int column_of(unsigned thread) {
  return static_cast<int>(thread / kWarp % kAcross * kColumns + thread % 4 * 2);
}
FASTINV_BLOCK inline int kind_of(const Descent& d, const BandedForm& form, unsigned thread) {
  const int tile = column_of(thread) / kColumns;
  return tile * kColumns < d.width ? form.kind[tile] : 0;
}
}  // namespace band

// A block's memory. All but the weights, which come last, lies at places that are known to the compiler.
struct BandMemory {
  uint32_t *high, *low;  // z, as tensor cores read it
  float* moments;        // [value][thread]: the second, and the first of those that are parked
  SplitRight* weights;   // a lane's words at [(kind · factors + factor) · 32 + lane]
};

// The steps of a block's images. A layout has
// - `kImages`, `kChannels`; `kSums`, of a thread, four values each, and `kParked`, how many of their first moments have
//   no registers;
// - `Keys`, what a thread keeps of its weights, and `keys(d, form, thread)`;
// - `takes(d, form)`, and `kHalf`, the words of half of z;
// - `pixels(d, image, thread, f)`: f(value, channel, where it lies in memory, its image, whether there is such a pixel)
//   for all of a thread's values. Those that are not in the image have the place of one that is, so that there is
//   nothing to branch on: they go with the others, and nobody looks at them.
// - `pair(d, thread, number)`: the word for values 2 · number and the next in `high` and `low`, or −1;
// - `multiply(d, form, warp, memory, all)`, which adds H·z to the gradients.
template <class Layout>
struct Banded {
  static constexpr int kBlocks = 1, kMostThreads = band::kThreads;
  static constexpr int kValues = 4 * Layout::kSums, kKept = kValues - Layout::kParked;
  static constexpr int kMoments = (kValues + Layout::kParked) * band::kThreads;  // in shared memory

  struct Own {
    float z[kValues], first[kKept];
    Sums gradient[Layout::kSums];  // times `scale`
    typename Layout::Keys keys;
  };

  BandedForm form;

  FASTINV_BOTH explicit Banded(const BandedForm& f) : form(f) {}
  FASTINV_BOTH int shared_floats() const {
    return 2 * Layout::kHalf + kMoments + form.factors * form.kinds * band::kFactor;
  }

  // All of its images have taken as many steps, as nothing stops one before the others.
  template <class Block>
  FASTINV_BLOCK void descend(const Descent& d, Block& block) {
    const int image = block.index() * Layout::kImages;
    const int begin = begin_of<Layout::kImages>(d, image);
    if (begin < 0) return;
    const int end = end_of(d, begin);
    auto* words = reinterpret_cast<uint32_t*>(block.shared());
    float* moments = block.shared() + 2 * Layout::kHalf;
    auto* weights = reinterpret_cast<SplitRight*>(moments + kMoments);
    memory_ = {words, words + Layout::kHalf, moments, weights};
    typename Block::template PerThread<Own> all(block);

    block.each([&](int thread) {
      const auto* from = reinterpret_cast<const SplitRight*>(form.weights);
      for (int i = thread; i < form.factors * form.kinds * kWarp; i += band::kThreads) memory_.weights[i] = from[i];
      for (int i = thread; i < 2 * Layout::kHalf; i += band::kThreads) memory_.high[i] = 0;
    });
    block.each([&](int thread) { start(d, image, in_place(thread), all[thread]); });
    block.each([&](int thread) {
      Own& own = all[thread];
      Layout::pixels(d, image, thread, [&](int v, int, uint32_t at, int, bool) { prime(own, v, at); });
    });
    for (int t = begin; t < end; ++t) {
      block.each_warp([&](const auto& warp) { Layout::multiply(d, form, warp, memory_, all); });
      block.each([&](int thread) { advance(d, image, t, in_place(thread), all[thread]); });
    }
    block.each([&](int thread) { finish(d, in_place(image), thread, all[thread]); });
    block.each([&](int thread) { report(d, image, thread); });
  }

 private:
  FASTINV_BLOCK float& second(int thread, int v) const { return memory_.moments[v * band::kThreads + thread]; }
  FASTINV_BLOCK float& first(Own& own, int thread, int v) const {
    return v < kKept ? own.first[v] : second(thread, kValues + v - kKept);
  }

  FASTINV_BLOCK void start(const Descent& d, int image, int thread, Own& own) const {
    own = {};
    own.keys = Layout::keys(d, form, thread);
    Layout::pixels(d, image, thread, [&](int v, int, uint32_t at, int, bool) {
      own.z[v] = d.z[at];
      first(own, thread, v) = d.first[at];
      second(thread, v) = d.second[at];
    });
    put(d, thread, own);
  }

  // The constant's part of a gradient, for the next product to add to.
  FASTINV_BLOCK void prime(Own& own, int v, uint32_t at) const {
    own.gradient[v / 4].at[v % 4] = form.constant[at] * form.scale;
  }

  // A thread's pixels, where tensor cores read them. Weights are 0 for one after the last column.
  FASTINV_BLOCK void put(const Descent& d, int thread, const Own& own) const {
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const int at = Layout::pair(d, thread, i);
      if (at < 0) continue;
      const Halved both = halved(own.z[2 * i], own.z[2 * i + 1]);
      memory_.high[at] = both.high;
      memory_.low[at] = both.low;
    }
  }

  FASTINV_BLOCK void advance(const Descent& d, int image, int t, int thread, Own& own) const {
    const Rule<Layout::kChannels> rule(d, t);
    Layout::pixels(d, image, thread, [&](int v, int channel, uint32_t at, int, bool) {
      float unused = 0.0f;
      const float gradient = own.gradient[v / 4].at[v % 4] * form.unscale;
      own.z[v] = step<true>(d, rule, channel, own.z[v], gradient, first(own, thread, v), second(thread, v), unused);
      prime(own, v, at);
    });
    put(d, thread, own);
  }

  FASTINV_BLOCK void finish(const Descent& d, int image, int thread, Own& own) const {
    Layout::pixels(d, image, thread, [&](int v, int, uint32_t at, int n, bool inside) {
      if (!inside || n >= d.images || d.running[n] != 1) return;  // `runs` as a call takes two registers too many
      d.z[at] = own.z[v];
      d.first[at] = first(own, thread, v);
      d.second[at] = second(thread, v);
    });
  }

  FASTINV_BLOCK void report(const Descent& d, int image, int thread) const {
    const int n = image + thread;
    if (thread < Layout::kImages && runs(d, n)) arrive(d, n, end_of(d, d.taken[n]));
  }

  BandMemory memory_{};
};

template <class Layout, class Block>
FASTINV_BLOCK void descend(const Descent& d, Banded<Layout> edge, Block& block) {
  edge.descend(d, block);
}
template <class Layout>
Grid grid_of(const Descent& d, const Banded<Layout>& edge) {
  return {(d.images + Layout::kImages - 1) / Layout::kImages, band::kThreads, edge.shared_floats()};
}

}  // namespace fastinv
