// The minimum of a quadratic objective whose matrix was inverted, for `Solver`.
#include <algorithm>
#include <cmath>

#include "solver.h"

namespace fastinv {

std::vector<float> Solver::hessian() const {
  const int64_t size = image_size();
  if (recipe_.method != Method::kExact || !knows_hessian() || size > kMostInverted) return {};
  std::vector<float> unit(static_cast<size_t>(size)), zeros(static_cast<size_t>(size));
  std::vector<float> matrix(static_cast<size_t>(size * size));
  Buffer scratch(quadratic_->scratch_floats());
  for (int64_t i = 0; i < size; ++i) {
    unit[static_cast<size_t>(i)] = 1.0f;
    quadratic_->gradient(unit.data(), zeros.data(), matrix.data() + i * size, scratch.data());
    unit[static_cast<size_t>(i)] = 0.0f;
  }
  return matrix;
}

void Solver::take_inverse(const double* inverse) {
  const auto size = static_cast<int>(image_size());
  inverse_ = std::make_unique<Product>(program_.kernels(), size, size, 1, false);
  for (int i = 0; i < size; ++i) {
    for (int o = 0; o < size; ++o) inverse_->set(0, i, o, *inverse++);
  }
}

// Steps of Newton's method: the first one leaves what rounding the inverse to float32 does, and the next one mends
// that. Images take each together, so that the matrix, 2.4 MB for 28×28 pixels, comes from memory once for all of them.
void Solver::newton(Workspace& w, Call& call, int64_t first, int64_t count) const {
  constexpr double kFalls = 0.25;  // a step's gradient of the one before, squared; where it does not, it is rounding
  const Kernels& kernels = program_.kernels();
  const Batch& batch = call.batch;
  const int64_t size = image_size();
  if (w.newton.size() == 0) w.newton = Buffer::for_work(newton_floats());
  float* const constants = w.newton.data();
  float* const solutions = constants + kMostTogether * size;
  float* const gradients = solutions + kMostTogether * size;
  float* const corrections = gradients + kMostTogether * size;
  struct Image {
    ImageReport report;
    double goal, left;  // squared lengths of gradients
    bool done;
    double at_zero;
  } images[kMostTogether];
  const auto differentiate = [&](int64_t i) {
    float* gradient = gradients + i * size;
    quadratic_->gradient(solutions + i * size, constants + i * size, gradient, w.copy);
    images[i].left = kernels.dot(gradient, gradient, size);
  };
  for (int64_t i = 0; i < count; ++i) {
    begin(w, batch, 0, first + i);
    std::copy_n(w.constant, size, constants + i * size);
    std::copy_n(w.images, size, solutions + i * size);
    differentiate(i);
    const double start = images[i].left;
    images[i] = {{0.0, 0, start == 0.0},
                 kExactGradient * kExactGradient * start,
                 start,
                 start == 0.0 || recipe_.steps == 0,
                 w.slots.front().at_zero};
  }
  const auto is_done = [](const Image& image) { return image.done; };
  while (!std::all_of(images, images + count, is_done)) {
    inverse_->run(1, static_cast<int>(count), gradients, 0, corrections, 0, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      Image& image = images[i];
      if (image.done) continue;
      const double before = image.left;
      kernels.add_scaled(-1.0f, corrections + i * size, solutions + i * size, size);
      differentiate(i);
      ++image.report.steps;
      ++call.steps;
      const bool falls = image.left <= kFalls * before;
      image.report.converged = image.left <= image.goal || (!falls && std::isfinite(image.left));
      image.done = image.report.converged || !falls || image.report.steps == recipe_.steps;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(constants + i * size, size, w.constant);
    w.slots.front().at_zero = images[i].at_zero;
    conclude(w, batch, first + i, solutions + i * size, images[i].report);
    ++call.images;
  }
}

}  // namespace fastinv
