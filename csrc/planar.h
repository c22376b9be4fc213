// Convolution in the layout of the public door, [C, H, W], with pixels of a row in the vector: for the first or last
// layers of a network with few channels; see csrc/kernels/planar.h.
#pragma once

#include <vector>

#include "buffer.h"
#include "convolution.h"

namespace fastinv {

class Planar : public Convolution {
 public:
  // Whether rows are read one pixel after the other: stride 1, or transposed with at most 2 columns a step; no
  // dilation.
  static bool applies(const Geometry& geometry);

  Planar(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  // On images [C, H, W].
  void run(const Operands& operands, Share share, float* scratch) const override;
  bool runs_abreast() const override { return true; }
  int row_step() const override { return tile_rows_ * static_cast<int>(phases_.size()); }
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;

 private:
  // The output rows of one residue modulo the stride, which share taps.
  struct Phase {
    int row;               // the residue
    int shift_y, shift_x;  // input position of the first tap for output 0 of the phase
    int taps_y, taps_x;
    int taps;        // row taps at once; divides taps_y
    Buffer weights;  // by group
    int64_t group_weights;
  };
  struct Unit {
    int phase, first_row, rows;
  };

  void run_unit(const Unit& unit, const Operands& operands, int64_t image, const float* next, int next_step) const;
  void plan_phase(int row, const WeightAt& weight);
  std::vector<Unit> cut(int first_row, int last_row) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  const int block_;      // output channels at once
  const int tile_rows_;  // at most, of one phase
  std::vector<Phase> phases_;
  std::vector<Unit> units_;
  Buffer bias_;
};

}  // namespace fastinv
