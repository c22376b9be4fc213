// Limited-memory BFGS within bounds (Nocedal 1980; Liu and Nocedal 1989), for one image.
//
// Elements at a bound whose gradient points out of it stand still; steps along the direction of the others are cut back
// to the bounds (projected Newton: Bertsekas 1982), and halved or so until the objective falls enough (Armijo 1966).
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace fastinv {

class Lbfgs {
 public:
  enum class Verdict {
    kRejected,  // the objective did not fall enough: z is a shorter step
    kAccepted,  // z is the next step to try
    kStuck      // accepted or not, there is nothing left to try
  };

  // `low` and `high`: bounds of every element, or null.
  Lbfgs(const Kernels& kernels, int64_t size, const float* low, const float* high);

  // Forgets what it knows, and starts at z.
  void restart(const float* z);

  // Takes objective and gradient at z, and writes there where both are wanted next.
  Verdict next(double objective, float* z, const float* gradient);

  // Memory of one image.
  static int64_t floats(int64_t size);

  // The last iterate accepted, the best so far, and its objective.
  const float* best() const { return z_.data(); }
  double objective() const { return objective_; }
  int64_t steps() const { return steps_; }  // that were accepted

 private:
  bool choose_direction();        // false at a minimum
  void try_step(float* z) const;  // z = the last iterate + step · direction, cut to the bounds
  bool falls_enough(double objective, const float* z);

  const Kernels& kernels_;
  const int64_t size_;
  const float *low_, *high_;
  Buffer z_, gradient_, direction_, moves_, changes_;  // of the last pairs of iterates: how z and the gradient changed
  std::vector<double> products_, weights_;             // change · move of every pair
  int64_t pairs_, newest_, steps_;
  double objective_, slope_, step_;
  int trials_;
  bool begun_;
};

}  // namespace fastinv
