// The minimum of a quadratic objective, for `Solver`.
#include <algorithm>
#include <cmath>

#include "solver.h"

namespace fastinv {

// What follows from a direction d by the quadratic part of the objective: its gradient is H·z + c, and this H·d.
void Solver::times_hessian(Workspace& w, const float* direction) const {
  const Kernels& kernels = program_.kernels();
  const int64_t size = image_size();
  float *z = w.images, *result = w.gradients;
  if (knows_hessian()) {
    quadratic_->gradient(direction, w.constant, result, w.copy);
    return;
  }
  // Features are edge(0) here, so c is 0 but for rounding; that must not be large beside the direction, which shrinks.
  const double length = std::sqrt(kernels.dot(direction, direction, size) / static_cast<double>(size));
  const float unit = length > 0.0 ? static_cast<float>(1.0 / length) : 1.0f;
  for (int64_t i = 0; i < size; ++i) z[i] = unit * direction[i];
  forward(w, 1);
  residual(w, 0);
  backward(w, 1);
  add_total_variation(w, 0);
  for (int64_t i = 0; i < size; ++i) result[i] *= static_cast<float>(length);
}

// Hestenes and Stiefel 1952. Takes the image in the first slot to the end; false when it was stopped on the way.
bool Solver::conjugate_gradients(Workspace& w, Call& call, Watch& watch) const {
  constexpr int kStalled = 50;  // steps without a new lowest residual: rounding is all that is left
  const Kernels& kernels = program_.kernels();
  const int64_t size = image_size();
  ImageReport& report = w.slots.front().report;
  float *z = w.images, *residual_left = w.first, *direction = w.second, *solution = w.largest, *constant = w.best;
  if (knows_hessian()) {
    quadratic_->gradient(z, w.constant, w.gradients, w.copy);
    std::copy_n(w.constant, size, constant);
    std::fill_n(w.constant, size, 0.0f);
  } else {
    forward(w, 1);
    residual(w, 0);
    backward(w, 1);
    add_total_variation(w, 0);
  }
  for (int64_t i = 0; i < size; ++i) direction[i] = residual_left[i] = -w.gradients[i];
  std::copy_n(z, size, solution);
  if (!knows_hessian()) {
    std::fill_n(z, size, 0.0f);
    forward(w, 1);
    std::copy_n(w.results, element_count(program_.shapes().back()), w.features);
  }
  double before = kernels.dot(residual_left, residual_left, size);
  const double goal = kExactGradient * kExactGradient * before;
  double lowest = before;
  int idle = 0;
  bool stopped = false;
  for (report.converged = before <= goal; !report.converged && report.steps < recipe_.steps; ++report.steps) {
    stopped = watch.stopped();
    if (stopped || idle == kStalled) break;
    times_hessian(w, direction);
    const float* image = w.gradients;
    const double curvature = kernels.dot(direction, image, size);
    if (!(curvature > 0.0)) break;  // in the null space, or too large for float32
    const float step = static_cast<float>(before / curvature);
    kernels.add_scaled(step, direction, solution, size);
    kernels.add_scaled(-step, image, residual_left, size);
    const double after = kernels.dot(residual_left, residual_left, size);
    const float keep = static_cast<float>(after / before);
    for (int64_t i = 0; i < size; ++i) direction[i] = residual_left[i] + keep * direction[i];
    before = after;
    idle = before < lowest ? 0 : idle + 1;
    lowest = std::min(lowest, before);
    report.converged = before <= goal;
    ++call.steps;
  }
  std::copy_n(solution, size, z);
  if (knows_hessian()) std::copy_n(constant, size, w.constant);
  report.objective = objective_alone(w);
  return !stopped;
}

}  // namespace fastinv
