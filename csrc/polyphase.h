// Transposed convolutions of stride 2 by Winograd's minimal filtering F(m, 2), m 2 or 4.
//
// Outputs of one parity in each axis are a convolution of stride 1: four phases, which share nothing but the input. A
// kernel of 3 taps gives the phases of an axis 2 taps and 1, one of 4 taps 2 and 2. Along an axis with 2 taps m outputs
// take m + 1 products instead of 2m: y = Aᵀ[(G g) ⊙ (Bᵀ d)] (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016), nested where both axes have 2 taps. For 4×4 inputs under a 3×3 kernel that is 25 + 20 + 20 + 16 =
// 81 products instead of 144. For each position of a phase the products over channels are one matrix product.
#pragma once

#include <memory>
#include <vector>

#include "buffer.h"
#include "convolution.h"
#include "product.h"

namespace fastinv {

// The outputs of one parity along an axis, a correlation of stride 1: output first + 2·i reads input start + i + j by
// tap last_tap − 2·j, for j < taps.
struct AxisPhase {
  int first, outputs, start, taps, last_tap;
};

AxisPhase axis_phase(const Axis& axis, int first);

struct PolyphaseForm {
  int outputs;    // m of F(m, 2): 2 or 4
  bool bfloat16;  // transformed inputs and weights are rounded to that
};

class Polyphase : public Convolution {
 public:
  // Whether the geometry is a transposed convolution of stride 2 with 2 to 4 taps an axis, without groups or dilation.
  static bool applies(const Geometry& geometry);

  Polyphase(const Kernels& kernels, const Geometry& geometry, PolyphaseForm form, const WeightAt& weight,
            const float* bias);

  void run(const Operands& operands, Share share, float* scratch) const override;
  int64_t scratch_floats(int64_t) const override;
  int row_step() const override;
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override {
    run_band(operands, first_row, last_row, {}, scratch);
  }
  std::string algorithm() const override;

 private:
  struct Phase {
    AxisPhase axis[2];
    int tile[2];                    // outputs of a tile: m, and 1 along an axis with one tap
    int inputs[2];                  // of a tile, which are its positions too
    int tiles[2];                   // of an image
    int positions;                  // products of a tile
    int row_units;                  // of work in a row of tiles: tiles; plain: products of up to 6 pixels
    int64_t units;                  // in an image
    int chunk;                      // tiles, of one image or several, that go through all three stages together
    int64_t in_stride, out_stride;  // floats from position to position
    std::unique_ptr<Product> product;
    int first_plain;  // plain: its first tile in product_tiles_

    bool plain() const { return positions == 1; }                          // one tap: nothing to transform
    int64_t work() const { return plain() ? kMaxTilePixels : positions; }  // of a unit, in products
  };

  void add_phase(int first_y, int first_x);
  void plan_plain(Phase* phase);
  void pack(const WeightAt& weight, const float* bias);
  void run_band(const Operands& operands, int first_row, int last_row, Share share, float* scratch) const;
  void run_tiles(const Phase& phase, const Operands& operands, int64_t first, int64_t last, float* scratch) const;
  void run_plain(const Phase& phase, const Operands& operands, int64_t first, int64_t last) const;
  void transform_inputs(const Phase& phase, const Operands& operands, int64_t first, int count,
                        float* transformed) const;
  void transform_outputs(const Phase& phase, const Operands& operands, const float* products, int64_t first,
                         int count) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  const PolyphaseForm form_;
  std::vector<Phase> phases_;
  std::vector<Tile> product_tiles_;  // of plain phases
  std::vector<Run> product_runs_;
  Buffer bias_, zeros_;
};

}  // namespace fastinv
