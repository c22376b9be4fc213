// Winograd's minimal filtering F(4×4, 3×3): 36 products instead of 144 for a 4×4 tile of outputs.
//
// Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). For each
// of the 36 positions the products over channels are one matrix product, tiles × in times in × out.
#pragma once

#include <vector>

#include "buffer.h"
#include "convolution.h"
#include "product.h"

namespace fastinv {

constexpr double kWinogradG[6][3] = {{1.0 / 4, 0, 0},
                                     {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                     {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                     {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                     {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                     {0, 0, 1}};

class Winograd : public Convolution {
 public:
  // Whether the geometry is a 3×3 convolution of stride 1 (transposed or not) without groups or dilation.
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
  int padding_[2];  // of the plain convolution that it is, transposed or not
  int tiles_y_, tiles_x_;
  int chunk_;                       // tiles, of one image or several, that go through all three stages together
  int64_t in_stride_, out_stride_;  // floats from position to position
  Product product_;
  Buffer bias_, zeros_;
};

}  // namespace fastinv
