#include "recipe.h"

#include <cmath>

#include "buffer.h"

namespace fastinv {
namespace {

constexpr double kPi = 3.14159265358979323846;

}  // namespace

std::vector<float> bounds(const std::vector<float>& by_channel, const Shape& image, int64_t lanes) {
  std::vector<float> all;
  if (by_channel.empty()) return all;
  for (int64_t pixel = 0; pixel < image[1] * image[2]; ++pixel) {
    for (const float bound : by_channel) all.insert(all.end(), static_cast<size_t>(lanes), bound);
  }
  return all;
}

void Descent::step(const Kernels& kernels, const Recipe& recipe, const Arrays& arrays) {
  const bool adam = recipe.optimizer != OptimizerKind::kSgd;
  power1_ *= recipe.beta1;
  power2_ *= recipe.beta2;
  const double correction1 = adam ? 1.0 - power1_ : 1.0, correction2 = adam ? 1.0 - power2_ : 1.0;
  const double done = static_cast<double>(steps_) / static_cast<double>(recipe.steps);
  const double lr = recipe.cosine ? recipe.lr * 0.5 * (1.0 + std::cos(kPi * done)) : recipe.lr;
  OptimizerArgs args = {};
  args.z = arrays.z;
  args.grad = arrays.gradient;
  args.first = arrays.first;
  args.second = arrays.second;
  args.largest = arrays.largest;
  args.low = arrays.low.empty() ? nullptr : arrays.low.data();
  args.high = arrays.high.empty() ? nullptr : arrays.high.data();
  args.size = arrays.size;
  args.kind = recipe.optimizer;
  args.beta1 = static_cast<float>(recipe.beta1);
  args.beta2 = static_cast<float>(recipe.beta2);
  args.eps = static_cast<float>(recipe.eps);
  args.step_size = static_cast<float>(lr / correction1);
  args.root_scale = static_cast<float>(1.0 / std::sqrt(correction2));
  args.momentum = static_cast<float>(recipe.momentum);
  args.first_step = steps_++ == 0;
  kernels.optimizer(args);
}

double total_variation(const Kernels& kernels, const Recipe& recipe, const Shape& image, const float* z,
                       float* gradient, float* scratch, int64_t lanes) {
  if (recipe.tv_weight == 0.0) return 0.0;
  return kernels.total_variation({z, gradient, scratch, static_cast<int32_t>(image[1]), static_cast<int32_t>(image[2]),
                                  static_cast<int32_t>(image[0] * lanes), static_cast<float>(recipe.tv_weight),
                                  static_cast<float>(recipe.tv_beta)});
}

int64_t total_variation_scratch(const Shape& image, int64_t lanes) {
  return round_up(3 * (image[2] + 1) * image[0] * lanes, kLineFloats);
}

}  // namespace fastinv
