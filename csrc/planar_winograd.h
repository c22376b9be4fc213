// Winograd's F(4, 3) along the columns of [C, H, W], with pixels of a row in the vector: 6 products instead of 12 for
// four results, for the layers with three row taps and few output channels that planar.h is for.
//
// Only rows are combined, so that vectors run on along them. Six rows are transformed for a chunk of channels at a
// time, as many as stay in L1, with zeros between rows for the column taps that reach over their ends.
#pragma once

#include "buffer.h"
#include "convolution.h"

namespace fastinv {

class PlanarWinograd : public Convolution {
 public:
  // Whether the geometry has three row taps, stride 1, no groups, no dilation and few output channels.
  static bool applies(const Geometry& geometry);

  PlanarWinograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  // On images [C, H, W].
  void run(const Operands& operands, Share share, float* scratch) const override;
  int64_t scratch_floats(int64_t) const override;
  int row_step() const override;
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;

 private:
  void pack(const WeightAt& weight);
  void run_tiles(const Operands& operands, int64_t first, int64_t last, float* scratch) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  const int block_;       // output channels at once
  int padding_[2];        // of the plain convolution that it is, transposed or not
  int tiles_;             // of four rows, in an image
  int chunk_;             // input channels at once
  int64_t margin_;        // floats of zeros before and between rows
  int64_t pitch_;         // floats from row to row
  int64_t products_row_;  // likewise of the products
  Buffer weights_, bias_;
};

}  // namespace fastinv
