// The last two layers of a larger decoder in one launch: a convolution of 64 channels that doubles the pixels, of 3×3
// taps behind an upsampling or 4×4 at a stride of 2, an activation, and a 3×3 convolution to a few channels. As in
// `tail.h` what lies between them never leaves the registers, and all weights stay in shared memory; images are of 16,
// 32 or 64 cells across, and as high as one likes.
//
// For 64 cells these are 64 products of 64×64×16 and 16 of 64×48×16: at 4,096 FLOPs a cycle 2,400 cycles.
#pragma once

#include "tail_last.h"
#include "window.h"

namespace fastinv {

namespace tail {

template <class Type, int kStrips, class Thread>
class WideWorker : LastLayer<Type, kStrips, Thread> {
  using Last = LastLayer<Type, kStrips, Thread>;
  using First = window::Window<Type, 64, Last::kSide, AroundTwo, Thread>;
  using Last::bands_, Last::p_, Last::self_, Last::team_, Last::sums_;

 public:
  static constexpr int kRing = First::ring(Last::kSide), kTeamBytes = kRing + 4 * Last::kFloats;
  static constexpr int kShared = First::kWeights + kLastBytes + 4 * (kBetween + kMostOutputs) + kTeams * kTeamBytes;
  static_assert(kShared <= kMostShared);
  static int shared(const Tail&) { return kShared; }

  FASTINV_BLOCK WideWorker(const Tail& p, Thread& self, unsigned char* shared)
      : Last(p, self, p.height / Last::kBand, last_in(shared), bias_in(shared), bias_in(shared) + kBetween,
             reinterpret_cast<float*>(ring_in(shared, self) + kRing)),
        first_(self, p.x, p.height, {}, shared, ring_in(shared, self)),
        shared_(shared) {}

  FASTINV_BLOCK void run(int block, int blocks) {
    const Alternation<kTeams> turns{{team_, blocks, p_.images}};
    const int step = turns.step();
    int n = block + blocks * team_;
    begin();
    self_.sync();
    if (n < p_.images) first_.fetch(n, 0);
    for (; n < p_.images; n += step) {
#pragma unroll 1
      for (int band = 0; band < bands_; ++band) {
        first_.wait();
        self_.sync(team_);
        first_.multiply(band, sums_, [&] { turns.wait(self_, n, band); });
        this->give(band, [&] {
          turns.hand_on(self_, n, band, bands_);
          self_.sync(team_);  // nobody reads the rows any more
          window::fetch_next(first_, n, band, bands_, step, p_.images);
        });
        self_.sync(team_);
        this->take(n, band);
      }
    }
  }

 private:
  FASTINV_BLOCK static unsigned char* last_in(unsigned char* shared) { return shared + First::kWeights; }
  FASTINV_BLOCK static float* bias_in(unsigned char* shared) {
    return reinterpret_cast<float*>(last_in(shared) + kLastBytes);
  }
  FASTINV_BLOCK static unsigned char* rings_in(unsigned char* shared) {
    return reinterpret_cast<unsigned char*>(bias_in(shared) + kBetween + kMostOutputs);
  }
  FASTINV_BLOCK static unsigned char* ring_in(unsigned char* shared, const Thread& self) {
    return rings_in(shared) + self.index() / kTeam * kTeamBytes;
  }

  // What all share.
  FASTINV_BLOCK void begin() {
    copy_all(self_, kThreads, shared_, p_.first, First::kWeights);
    copy_all(self_, kThreads, last_in(shared_), p_.last, kLastBytes);
    share_biases(p_, self_, kThreads, bias_in(shared_));
    clear_all(self_, kThreads, rings_in(shared_), kTeams * kTeamBytes);
    self_.publish();
  }

  First first_;
  unsigned char* shared_;
};

}  // namespace tail

}  // namespace fastinv
