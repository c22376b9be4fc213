// What an rMLE step on an affine edge needs, formed once: ‖A·z + b − v‖² has the gradient 2·AᵀA·z + c, where c is the
// gradient at z = 0. For a convolution A of stride 1 and k taps an axis, AᵀA is a convolution from image to image of
// 2·k − 1 taps, whose weights differ near the border: there fewer of A's results see a pixel. With many results to each
// pixel this is far less work than A and Aᵀ (CIFAR-10, 3 → 64 channels of 3×3 taps: 75 products a value for 1,152).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "convolution.h"

namespace fastinv {

class Quadratic {
 public:
  // Whether it can be formed for the convolution, and is less work than A and Aᵀ.
  static bool pays(const Geometry& geometry);

  // `bias` is [out_channels].
  Quadratic(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, std::vector<float> bias);

  // Adds weight · TV₂(z), a quadratic form too: the sum of squared differences to the next row and column. False where
  // A has a single tap along an axis, and there is no room for it.
  bool add_total_variation(double weight);

  // ‖b − v‖² of features v [C, H, W], and the gradient's constant, 2·Aᵀ(b − v) [H, W, C]. `scratch` has
  // at_zero_scratch_floats() floats, on a cache line.
  double at_zero(const float* features, float* constant, float* scratch) const;
  int64_t at_zero_scratch_floats() const;

  // gradient = 2·AᵀA·z + constant, all [H, W, C]. `scratch` has scratch_floats() floats, and is all zeros or what the
  // last call left.
  void gradient(const float* z, const float* constant, float* gradient, float* scratch) const;
  int64_t scratch_floats() const { return (in_rows_ + 2) * in_row_; }

 private:
  // Rows with the same weights, of groups · taps row taps, `taps` at once; or, where taps is 0, a few rows with weights
  // of their own, of so many row taps of the first of them from `tap` on.
  struct Band {
    int first, rows;
    int tap, taps, groups;
    int64_t weights;  // where they begin

    int abreast() const { return taps == 0 ? rows : taps; }  // vectors of weights to each float of z
    int different() const { return taps == 0 ? rows : 1; }   // rows that have weights of their own
  };

  int64_t plane() const { return int64_t{geometry_.axis[0].out} * geometry_.axis[1].out; }  // of a channel of results
  int64_t pixels() const { return int64_t{geometry_.axis[0].in} * geometry_.axis[1].in; }
  int64_t image_floats() const { return round_up(pixels() * geometry_.in_channels, kLineFloats); }
  void plan_bands();
  // The weight by which this result depends on the float so many row taps and floats of a row on.
  float& weight_at(const Band& band, int row, int64_t i, int tap, int offset);
  double weight(const std::vector<double>& products, int row, int column, int channel, int tap, int offset) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  int64_t row_, in_row_, in_rows_;  // floats in a row of the image and of the padded copy of it, whose rows there are
  int reach_;                       // from a float to the farthest of a row that it depends on, either way
  std::vector<Band> bands_;
  Buffer weights_;
  const std::vector<float> bias_;
  const std::unique_ptr<const Convolution> adjoint_;  // −2·Aᵀ, from [C, H, W] to [C, H, W]
  std::vector<float> of_bias_;                        // 2·Aᵀb, [C, H, W]
};

}  // namespace fastinv
