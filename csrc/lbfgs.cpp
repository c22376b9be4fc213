#include "lbfgs.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastinv {
namespace {

constexpr int64_t kPairs = 10;
constexpr float kFirstMove = 0.1f;  // of any element, in normalised units, while there is no idea of the scale
constexpr double kArmijo = 1e-4;
constexpr int kTrials = 20;

}  // namespace

Lbfgs::Lbfgs(const Kernels& kernels, int64_t size, const float* low, const float* high)
    : kernels_(kernels),
      size_(size),
      low_(low),
      high_(high),
      z_(size),
      gradient_(size),
      direction_(size),
      moves_(kPairs * size),
      changes_(kPairs * size),
      products_(kPairs),
      weights_(kPairs) {}

int64_t Lbfgs::floats(int64_t size) { return (3 + 2 * kPairs) * size; }

void Lbfgs::restart(const float* z) {
  pairs_ = newest_ = steps_ = 0;
  begun_ = false;
  objective_ = std::numeric_limits<double>::quiet_NaN();
  std::copy_n(z, size_, z_.data());
}

Lbfgs::Verdict Lbfgs::next(double objective, float* z, const float* gradient) {
  if (begun_ && !falls_enough(objective, z)) {
    if (++trials_ < kTrials) {
      // The minimum of the parabola through what is known, where that makes sense; also of NaN, a tenth.
      const double excess = objective - objective_ - slope_ * step_;
      const double parabola = -0.5 * slope_ * step_ * step_ / excess;
      step_ = parabola > 0.1 * step_ ? std::min(parabola, 0.5 * step_) : 0.1 * step_;
    } else {
      if (pairs_ == 0) return Verdict::kStuck;
      pairs_ = 0;  // what it knows leads nowhere
      if (!choose_direction()) return Verdict::kStuck;
    }
    try_step(z);
    return Verdict::kRejected;
  }
  if (begun_) {
    ++steps_;
    const int64_t at = pairs_ == 0 ? 0 : (newest_ + 1) % kPairs;
    float *move = moves_.data() + at * size_, *change = changes_.data() + at * size_;
    for (int64_t i = 0; i < size_; ++i) {
      move[i] = z[i] - z_[i];
      change[i] = gradient[i] - gradient_[i];
    }
    const double product = kernels_.dot(move, change, size_);
    if (product > 1e-10 * kernels_.dot(change, change, size_)) {  // else the curvature is none that can be used
      products_[static_cast<size_t>(at)] = product;
      newest_ = at;
      pairs_ = std::min(pairs_ + 1, kPairs);
    }
  }
  begun_ = true;
  objective_ = objective;
  std::copy_n(z, size_, z_.data());
  std::copy_n(gradient, size_, gradient_.data());
  if (!choose_direction()) return Verdict::kStuck;
  try_step(z);
  return Verdict::kAccepted;
}

bool Lbfgs::falls_enough(double objective, const float* z) {
  double expected = slope_ * step_;
  if (low_) {  // along the path that was cut back
    expected = 0.0;
    for (int64_t i = 0; i < size_; ++i) expected += double{gradient_[i]} * (double{z[i]} - double{z_[i]});
  }
  return objective <= objective_ + kArmijo * std::min(expected, 0.0) && objective < objective_;
}

bool Lbfgs::choose_direction() {
  float* d = direction_.data();
  const auto stands = [this](int64_t i) {
    return low_ && ((z_[i] <= low_[i] && gradient_[i] > 0.0f) || (z_[i] >= high_[i] && gradient_[i] < 0.0f));
  };
  const auto downhill = [&] {
    for (int64_t i = 0; i < size_; ++i) d[i] = stands(i) ? 0.0f : -gradient_[i];
  };
  trials_ = 0;
  step_ = 1.0;
  downhill();
  if (pairs_ > 0) {
    const auto pair = [this](int64_t age) { return (newest_ + kPairs - age) % kPairs; };
    for (int64_t age = 0; age < pairs_; ++age) {
      const int64_t p = pair(age);
      const auto k = static_cast<size_t>(p);
      weights_[k] = kernels_.dot(moves_.data() + p * size_, d, size_) / products_[k];
      kernels_.add_scaled(static_cast<float>(-weights_[k]), changes_.data() + p * size_, d, size_);
    }
    const float* change = changes_.data() + newest_ * size_;
    const auto scale =
        static_cast<float>(products_[static_cast<size_t>(newest_)] / kernels_.dot(change, change, size_));
    for (int64_t i = 0; i < size_; ++i) d[i] *= scale;
    for (int64_t age = pairs_; age-- > 0;) {
      const int64_t p = pair(age);
      const auto k = static_cast<size_t>(p);
      const double weight = weights_[k] - kernels_.dot(changes_.data() + p * size_, d, size_) / products_[k];
      kernels_.add_scaled(static_cast<float>(weight), moves_.data() + p * size_, d, size_);
    }
    if (low_) {
      for (int64_t i = 0; i < size_; ++i) d[i] = stands(i) ? 0.0f : d[i];
    }
    slope_ = kernels_.dot(gradient_.data(), d, size_);
    if (slope_ < 0.0) return true;
    pairs_ = 0;
    downhill();
  }
  float largest = 0.0f;
  for (int64_t i = 0; i < size_; ++i) largest = std::max(largest, std::fabs(d[i]));
  if (!(largest > 0.0f)) return false;
  for (int64_t i = 0; i < size_; ++i) d[i] *= kFirstMove / largest;
  slope_ = kernels_.dot(gradient_.data(), d, size_);
  return slope_ < 0.0;
}

void Lbfgs::try_step(float* z) const {
  const auto step = static_cast<float>(step_);
  const float *from = z_.data(), *direction = direction_.data();
  for (int64_t i = 0; i < size_; ++i) {
    z[i] = from[i] + step * direction[i];
    if (low_) z[i] = std::min(std::max(z[i], low_[i]), high_[i]);
  }
}

}  // namespace fastinv
