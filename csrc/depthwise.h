// Depthwise convolution, a filter for each channel, of any stride, padding and dilation, transposed or not; see
// csrc/kernels/depthwise.h.
#pragma once

#include <string>
#include <vector>

#include "buffer.h"
#include "convolution.h"

namespace fastinv {

class Depthwise : public Convolution {
 public:
  static bool applies(const Geometry& geometry);

  // `bias` is [channels] or null.
  Depthwise(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  void run(const Operands& operands, Share share, float* scratch) const override;
  int row_step() const override { return 1; }
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;

 private:
  void plan_rows();
  void plan_columns();
  void add_tiles(int phase, const std::vector<int>& taps, int slot);
  void add_runs(int x, int pixels, const std::vector<int>& taps, int slot);
  void pack(const WeightAt& weight, const float* bias);

  const Kernels& kernels_;
  const Geometry geometry_;
  const int unit_;        // columns from one to the next that a run reads: 1, or from pixel to pixel where that is more
  const int pixel_step_;  // of these units from pixel to pixel, 1 or 2
  std::vector<DepthwiseTapRow> tap_rows_;    // those inside the image, of one row of the results after the other
  std::vector<size_t> first_tap_row_ = {0};  // of each row of the results, and the end
  std::vector<DepthwiseTile> tiles_;         // of a row of the results
  std::vector<DepthwiseRun> runs_;
  std::vector<int> columns_;  // the column tap in each place of the packed weights
  Buffer weights_, bias_;
};

}  // namespace fastinv
