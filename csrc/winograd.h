// Winograd's minimal filtering, F(4×4, 3×3) and F(2×2, 5×5): 36 products for a tile of outputs instead of 144 and 100.
//
// Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). Both forms
// evaluate polynomials at 0, ±1, ±2 and ∞, so they share Bᵀ: a row of G is (1, a, a², …) over the product of a's
// distances to the other points, a row of Aᵀ the same power of all points. For each of the 36 positions the products
// over channels are one matrix product, tiles × in times in × out.
//
// The adjoint form is the plain one of the gradient's convolution read backwards, D += B[(G g Gᵀ) ⊙ (A Y Aᵀ)]Bᵀ: tiles
// lie in the input, and each adds to the 6×6 results around it. Where a convolution without padding has shrunk an
// image, its gradient has fewer tiles that way: 16 for 36 from 8×8 to 12×12.
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

  // Whether the adjoint form has fewer tiles.
  static bool shrinks(const Geometry& geometry);

  Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  // In the adjoint form, which knows neither bias nor activation.
  Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight);

  void run(const Operands& operands, Share share, float* scratch) const override;
  int64_t scratch_floats(int64_t lanes) const override;
  bool runs_abreast() const override { return true; }
  int row_step() const override;
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;

 private:
  Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, bool adjoint);
  void pack(const WeightAt& weight);
  // Rows of results, image after image.
  struct RowRange {
    int64_t begin, end;
  };
  void clear(const Operands& operands, RowRange rows) const;
  void run_adjoint(const Operands& operands, RowRange rows, float* scratch) const;
  // In the adjoint form adding to these rows alone.
  void run_tiles(const Operands& operands, int64_t first, int64_t last, float* scratch, RowRange rows = {}) const;
  // Tiles, of one image or several, that go through all three stages together.
  struct Chunk {
    int tiles;
    int64_t in_stride, out_stride;  // floats from position to position
  };
  // Where a tile begins, in the results or, in the adjoint form, in the input.
  struct Tile {
    int64_t image;
    int y, x;
  };
  Tile tile(int64_t number) const;
  Chunk plan(int64_t lanes) const;
  const Chunk& chunk(int64_t lanes) const { return lanes > 1 ? abreast_ : single_; }
  void transform_inputs(const Operands& operands, const Chunk& chunk, int64_t first, int count,
                        float* transformed) const;
  void transform_outputs(const Operands& operands, const Chunk& chunk, const float* products, int64_t first,
                         int count) const;
  void add_outputs(const Operands& operands, const Chunk& chunk, const float* products, int64_t first, int count,
                   RowRange rows) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  const bool adjoint_;
  const int taps_, outputs_;  // of the filter, and of a tile, along an axis
  int padding_[2];            // of the plain convolution that it is, or, in the adjoint form, is the gradient of
  int tiles_y_, tiles_x_;
  Chunk single_, abreast_;
  Product product_;
  Buffer bias_, zeros_;
};

}  // namespace fastinv
