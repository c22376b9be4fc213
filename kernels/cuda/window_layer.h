// A convolution of 64 or 128 channels to 128 at most as `window.h` takes it, of channels that lie last: its sums end as
// those of all kernels do, with bias, what is added, and activation. A block has the weights of 64 outputs; where there
// are more, every second block has the others'.
#pragma once

#include <type_traits>

#include "finish.h"
#include "window.h"

namespace fastinv {

struct WindowLayer {
  const void* x;        // two-byte values [images, height, width, inputs]
  const void* weights;  // as they lie in shared memory, tile by tile, of one 64 outputs after the other
  const float* bias;    // [outputs], or null
  const void* addend;   // like out, or null
  void* out;            // two-byte values [images, height · s, width · s, outputs], s = 2 with four phases
  window::Across<0> across;
  int32_t images, height, inputs, outputs, phases, float16;
  Finish finish;
  float a, b;  // its parameters

  FASTINV_BOTH int parts() const { return (outputs + window::kOutputs - 1) / window::kOutputs; }
};

namespace window {

constexpr int kMostParts = 2;

// Warpgroups are as many as registers and memory allow, so that one multiplies while others do all else.
template <class Type, int kInputs, class Taps, int kTeams, class Thread>
class LayerWorker {
  using Cells = Window<Type, kInputs, 0, Taps, Thread>;
  static constexpr int kPhases = Taps::kPhases, kThreads = kTeams * kTeam;
  // With four phases all else takes about as long as the products.
  using InTurn = std::conditional_t<kPhases == 4, Alternation<kTeams>, Turns<kTeams>>;

 public:
  FASTINV_BOTH static int shared(const WindowLayer& p) {
    return Cells::kWeights + 4 * kOutputs + kTeams * Cells::ring(p.across.cells());
  }

  FASTINV_BLOCK LayerWorker(const WindowLayer& p, Thread& self, unsigned char* shared)
      : p_(p),
        self_(self),
        team_(self.index() / kTeam),
        warp_(self.index() % kTeam / kWarp),
        lane_(self.index() % kWarp),
        shared_(shared),
        bias_(reinterpret_cast<float*>(shared + Cells::kWeights)),
        cells_(self, p.x, p.height, p.across, shared,
               reinterpret_cast<unsigned char*>(bias_ + kOutputs) + team_ * Cells::ring(p.across.cells())) {}

  FASTINV_BLOCK void run(int block, int blocks) {
    const int parts = p_.parts(), part = block % parts;
    block /= parts;
    blocks = (blocks - part + parts - 1) / parts;
    first_ = part * kOutputs;
    outputs_ = p_.outputs - first_;
    const InTurn turns{{team_, blocks, p_.images}};
    const int step = turns.step(), all = p_.height * p_.across.cells();
    const int bands = (all + kBand - 1) / kBand;
    int n = block + blocks * team_;
    share<Cells::kWeights>(self_, kThreads, shared_, shared(p_),
                           static_cast<const unsigned char*>(p_.weights) + part * Cells::kWeights,
                           p_.bias == nullptr ? nullptr : p_.bias + first_, outputs_);
    self_.sync();
    if (n < p_.images) {
      cells_.fetch(n, 0);
      turns.begin(self_);
    }
    for (; n < p_.images; n += step) {
#pragma unroll 1
      for (int band = 0; band < bands; ++band) {
        cells_.wait();
        self_.sync(team_);
        float sums[kPhases][kOutputs / 2];
        cells_.multiply(band, sums, [&] { turns.wait(self_, n, band); });
        turns.hand_on(self_, n, band, bands);
        self_.sync(team_);  // nobody reads the rows any more
        fetch_next(cells_, n, band, bands, step, p_.images);
        const int cells[2] = {cell_of(band, 0), cell_of(band, 1)};
        const int64_t places[2] = {place_of(n, cells[0]), place_of(n, cells[1])};
        const bool inside[2] = {cells[0] < all, cells[1] < all};
#pragma unroll
        for (int phase = 0; phase < kPhases; ++phase) put(places, inside, phase, sums[phase]);
      }
    }
  }

 private:
  // The cell of a band of which a lane has row h of the sums, and where in `out` its first pixel begins.
  static constexpr int kTimes = kPhases == 4 ? 2 : 1;
  FASTINV_BLOCK int cell_of(int band, int h) const { return band * kBand + warp_ * 16 + lane_ / 4 + 8 * h; }
  FASTINV_BLOCK int64_t place_of(int n, int cell) const {
    const int width = p_.across.cells();
    // Rows of two pixels a cell, and twice as many: where there are four phases, 2 · row · width are before a row.
    const int64_t flat = kPhases == 4 ? int64_t{2 * p_.across.row_of(cell)} * width + 2 * cell : cell;
    return (int64_t{n} * p_.height * width * kPhases + flat) * p_.outputs;
  }

  // A lane has two channels of every eight, of two cells. What is added to them is all on its way before any of it is
  // waited for. Neighbours exchange theirs, so that each stores four channels in one piece: even lanes those of the
  // first of two eights, odd lanes of the second.
  FASTINV_BLOCK void put(const int64_t (&places)[2], const bool (&inside)[2], int phase,
                         float (&sums)[kOutputs / 2]) const {
    constexpr int kEights = kOutputs / 8;
    const int further = (phase / 2 * kTimes * p_.across.cells() + phase % 2) * p_.outputs + first_;
    const int channel = lane_ % 4 * 2;  // of an eight
    if (p_.addend != nullptr) {
      const auto* addend = static_cast<const uint16_t*>(p_.addend) + further + channel;
      uint32_t added[kEights][2];
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool there = inside[h] && 8 * j < outputs_;
          added[j][h] = there ? *reinterpret_cast<const uint32_t*>(addend + places[h] + 8 * j) : 0;
        }
      }
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float low, high;
          unpack(Type{}, added[j][h], low, high);
          sums[4 * j + 2 * h] += low;
          sums[4 * j + 2 * h + 1] += high;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) sums[i] += bias_[i / 4 * 8 + channel + i % 2];
    finish(p_, sums);
    const bool odd = lane_ % 2 == 1;
    auto* out = static_cast<uint16_t*>(p_.out) + further + (odd ? 8 : 0) + channel / 4 * 4;
#pragma unroll
    for (int j = 0; j < kEights; j += 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* first = sums + 4 * j + 2 * h;
        const uint32_t low = pack(Type{}, first[0], first[1]), high = pack(Type{}, first[4], first[5]);
        const uint32_t got = self_.shuffle(odd ? low : high, lane_ ^ 1);
        if (!inside[h] || 8 * j + (odd ? 8 : 0) >= outputs_) continue;
        *reinterpret_cast<TwoWords*>(out + places[h] + 8 * j) = odd ? TwoWords{{got, high}} : TwoWords{{low, got}};
      }
    }
  }

  const WindowLayer& p_;
  Thread& self_;
  const int team_, warp_, lane_;
  int first_ = 0, outputs_ = 0;  // those of the block, and of all from there on
  unsigned char* shared_;
  float* bias_;
  Cells cells_;
};

}  // namespace window

}  // namespace fastinv
