// What rMLE minimises and how: Σ(edge(z) − v)² + weight · TV_β(z), from a start, by a method (He et al. 2019, Algorithm
// 1).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace fastinv {

enum class Method {
  kDescent,  // steps of the optimizer
  kLbfgs,
  kExact  // the minimum of a quadratic objective
};

struct Recipe {
  Method method;
  OptimizerKind optimizer;
  int64_t steps;
  double lr, beta1, beta2, eps, momentum;
  bool cosine;  // the step size falls to 0 in half a wave
  double tv_weight, tv_beta;
  double tolerance;
  int64_t patience;
  bool keep_best;
  std::vector<float> low, high;  // bounds of z for every channel, or empty

  // Whether the objective is needed after every step.
  bool watches() const { return tolerance > 0.0 || keep_best || method == Method::kLbfgs; }
};

// The bounds of every element of an image [H, W, C, lane], or nothing where there are none.
std::vector<float> bounds(const std::vector<float>& by_channel, const Shape& image, int64_t lanes = 1);

// The optimizer's steps from the first on.
class Descent {
 public:
  // What a step works on: so many floats each, and bounds of every element or none.
  struct Arrays {
    float* z;
    const float* gradient;
    float *first, *second, *largest;
    const std::vector<float>&low, &high;
    int64_t size;
  };
  // The next step.
  void step(const Kernels& kernels, const Recipe& recipe, const Arrays& arrays);

 private:
  int64_t steps_ = 0;
  // Of Adam's betas: pow() would take a twentieth of a step of MNIST conv1.
  double power1_ = 1.0, power2_ = 1.0;
};

// The total variation of an image [H, W, C] or, with lanes, the sum of those of images abreast; adds the gradient.
// `scratch` has total_variation_scratch floats.
double total_variation(const Kernels& kernels, const Recipe& recipe, const Shape& image, const float* z,
                       float* gradient, float* scratch, int64_t lanes = 1);
int64_t total_variation_scratch(const Shape& image, int64_t lanes = 1);

}  // namespace fastinv
