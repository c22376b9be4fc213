// How the warpgroups of a block share the images, and when each of them multiplies: in step they would all multiply
// together, and then all do the rest, while the tensor cores wait.
#pragma once

#include "halves.h"

namespace fastinv {

// Image after image goes to a block of its own, then to its second warpgroup, and so on.
template <int kTeams>
struct Shares {
  int team, blocks, images;

  FASTINV_BLOCK int step() const { return blocks * kTeams; }  // from one of a warpgroup's images to its next
};

// They begin one after the other, each when the one before has made its first products.
template <int kTeams>
struct Turns : Shares<kTeams> {
  // Before all images, where there is one; before and after the products of a band of image n.
  template <class Thread>
  FASTINV_BLOCK void begin(const Thread& self) const {
    if (this->team > 0) self.wait_turn(this->team);
  }
  template <class Thread>
  FASTINV_BLOCK void wait(const Thread&, int, int) const {}
  template <class Thread>
  FASTINV_BLOCK void hand_on(const Thread& self, int n, int band, int) const {
    if (band == 0 && n < this->step() && this->team + 1 < kTeams && n + this->blocks < this->images) {
      self.hand_on(this->team + 1);
    }
  }
};

// Two, or one, that multiply in turn, band by band: where products leave few gaps that the other could fill, and all
// else takes no longer than they do, they are never in each other's way.
template <int kTeams>
struct Alternation : Shares<kTeams> {
  static_assert(kTeams <= 2);

  template <class Thread>
  FASTINV_BLOCK void begin(const Thread&) const {}
  // Where the other has a band before, or after.
  template <class Thread>
  FASTINV_BLOCK void wait(const Thread& self, int n, int band) const {
    if (kTeams == 1) return;
    if (this->team == 1 || (band == 0 ? n >= this->blocks : n + this->blocks < this->images)) {
      self.wait_turn(this->team);
    }
  }
  template <class Thread>
  FASTINV_BLOCK void hand_on(const Thread& self, int n, int band, int bands) const {
    if (kTeams == 1) return;
    if ((this->team == 1 && band + 1 < bands) || n + this->blocks < this->images) self.hand_on(1 - this->team);
  }
};

}  // namespace fastinv
