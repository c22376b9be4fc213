// Winograd's minimal filtering, F(4×4, 3×3) and F(2×2, 5×5): 36 products for a tile of outputs instead of 144 and 100.
//
// Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). Both forms
// evaluate polynomials at 0, ±1, ±2 and ∞, so they share Bᵀ: a row of G is (1, a, a², …) over the product of a's
// distances to the other points, a row of Aᵀ the same power of all points. For each of the 36 positions the products
// over channels are one matrix product, tiles × in times in × out.
#pragma once

#include <vector>

#include "buffer.h"
#include "convolution.h"
#include "product.h"

namespace fastinv {

constexpr int kWinogradPoints = 6;

// G for filters of three or five taps.
double winograd_g(int taps, int point, int tap);

// Outputs along an axis of a tile.
inline int winograd_outputs(int taps) { return kWinogradPoints + 1 - taps; }

class Winograd : public Convolution {
 public:
  // Whether the geometry is a 3×3 or 5×5 convolution of stride 1 (transposed or not) without groups or dilation.
  static bool applies(const Geometry& geometry);

  Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  void run(const Operands& operands, Share share, float* scratch) const override;
  int64_t scratch_floats() const override;
  int row_step() const override;
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;

 private:
  void pack(const WeightAt& weight, const float* bias);
  void run_tiles(const Operands& operands, int64_t first, int64_t last, float* scratch) const;
  void transform_inputs(const Operands& operands, int64_t first, int count, float* transformed) const;
  void transform_outputs(const Operands& operands, const float* products, int64_t first, int count) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  const int taps_, outputs_;  // of the filter, and of a tile, along an axis
  int padding_[2];            // of the plain convolution that it is, transposed or not
  int tiles_y_, tiles_x_;
  int chunk_;                       // tiles, of one image or several, that go through all three stages together
  int64_t in_stride_, out_stride_;  // floats from position to position
  Product product_;
  Buffer bias_, zeros_;
};

}  // namespace fastinv
