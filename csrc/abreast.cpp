// Groups of images abreast, for `Solver`.
#include <algorithm>
#include <cmath>

#include "solver.h"

namespace fastinv {

// An image of a group takes 0.77 of the time of one by itself, measured at MNIST ReLU2: 14.6 of 19 µs a step. Workers
// take groups first, then what is left one by one: as many groups as bring the last of them home earliest.
int64_t Solver::abreast(int64_t n) const {
  constexpr double kAbreast = 0.77;
  if (!lockstep_) return 0;
  const double single = 1.0 / (kAbreast * static_cast<double>(lockstep_->images()));  // in times of a group
  const int64_t most = n / lockstep_->images();
  int64_t best = 0;
  double shortest = INFINITY;
  for (int64_t groups = std::max<int64_t>(0, most - threads_); groups <= most; ++groups) {
    const double rounds = static_cast<double>((groups + threads_ - 1) / threads_);
    const double work = static_cast<double>(groups) + single * static_cast<double>(n - groups * lockstep_->images());
    const double time = std::max(rounds, work / threads_);
    if (time <= shortest) best = groups;
    shortest = std::min(shortest, time);
  }
  return best * lockstep_->images();
}

// A group from this image on to the end, or until it is stopped. The objectives are those of single images.
void Solver::run_abreast(Workspace& w, Call& call, Watch& watch, int64_t image) const {
  if (!w.abreast) w.abreast = lockstep_->make_workspace();
  const Batch& batch = call.batch;
  const int64_t count = lockstep_->images();
  const int64_t steps = lockstep_->run(*w.abreast, features_of(batch, image), batch.init + image * batch.init_stride,
                                       batch.init_stride, [&] {
                                         if (watch.stopped()) return false;
                                         call.steps += count;
                                         return true;
                                       });
  for (int64_t k = 0; k < count; ++k) {
    conclude(w, batch, image + k, lockstep_->iterate(*w.abreast, k), {0.0, steps, false});
  }
  if (steps == recipe_.steps) call.images += count;
}

}  // namespace fastinv
