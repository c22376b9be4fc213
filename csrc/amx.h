// Dense convolutions as products of bfloat16 tiles, with float32 sums, on processors with AMX.
//
// A tile holds 16 pixels of 32 input channels, or 32 input channels of 16 output channels; one instruction multiplies
// two, 16,384 operations in 16 cycles. Pixels side by side are rows of one tile, so that every tap is one more product
// and nothing is gathered: images are only rounded to bfloat16 on their way into memory with zeros around each. Another
// convolution on tiles may leave them so.
#pragma once

#include <optional>
#include <vector>

#include "buffer.h"
#include "convolution.h"
#include "padded.h"

namespace fastinv {

class Amx : public Convolution {
 public:
  static bool applies(const Kernels& kernels, const Geometry& geometry);

  // Whether it can give images [C, H, W]: those of few channels, which such a form suits better.
  static bool gives_row_major(const Geometry& geometry);

  // It reads images [H, W, C] or [C, H, W], and gives either, where gives_row_major() says so.
  Amx(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias, Layouts layouts);

  void run(const Operands& operands, Share share, float* scratch) const override;
  int64_t scratch_floats(int64_t) const override { return in_place_ ? 0 : copy_size(copied_rows_) / 2; }
  int row_step() const override { return plan_.flat ? 0 : 1; }
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;
  const Padded* reads_padded() const override { return layouts_.in_row_major ? nullptr : &copy_; }
  void read_padded() override { in_place_ = true; }
  bool give_padded(const Padded& layout) override;

  // How positions, outputs of a phase side by side, are laid out in tiles: each row of outputs in tiles of its own; or
  // flat, one position after the other through the zeros between rows and images, where rows would leave tiles empty.
  //
  // Where results are [C, H, W], `row_major`, rows of taps can be stacked: each is so many output channels more of one
  // tile, which would be almost empty else; a row of outputs then is a sum over rows of products.
  struct Plan {
    bool flat;
    double filled;  // part of the tiles' rows that are outputs
    int stacked;    // rows of taps, or 1
  };
  static Plan plan(const Geometry& geometry, bool row_major);

 private:
  // The outputs of one residue: a correlation of its own, which shares the copy of the inputs.
  struct Phase {
    int first[2], outputs[2];   // by axis
    int first_row, last_row;    // that its taps read for output row 0
    std::vector<int64_t> taps;  // elements from the pixel that output 0 would read without padding
    int64_t weights;            // where they begin
  };

  // Tiles of a phase that are computed together.
  struct Part {
    int64_t first, last, positions;
    int row_positions, image_rows;
  };

  void add_phase(int first_y, int first_x);
  void clear_around(const Operands& operands, int first_row, int last_row) const;
  void pack(const WeightAt& weight, const float* bias);
  void choose_band();
  int64_t copy_size(int64_t rows) const;  // elements
  void run_band(const Operands& operands, int64_t image, int images, int first_row, int last_row, Share share,
                float* scratch) const;
  Part part(const Phase& phase, int images, int first_row, int last_row, Share share) const;
  int64_t pieces(const Phase& phase, const Part& part) const;
  int row_read(const Part& part, int64_t position) const;
  AmxAhead what_is_next(const Operands& operands, int64_t image, int images, int64_t pieces) const;
  void fill(const Operands& operands, int64_t image, int images, int first_row, int last_row, uint16_t* copy,
            AmxAhead* ahead) const;
  AmxArgs arguments(const Phase& phase, const Part& part, const Operands& operands, int64_t image) const;

  const Kernels& kernels_;
  const Geometry geometry_;
  const Layouts layouts_;
  const Plan plan_;
  const Padded copy_;          // images as they are multiplied
  bool in_place_ = false;      // they are given so
  std::optional<Padded> out_;  // how results are given, where they are handed over
  int step_[2];                // inputs from output to output of a phase
  int group_ = 1;              // images at once
  int band_;                   // output rows at once; of groups all
  int64_t copied_rows_ = 0;    // at most
  std::vector<Phase> phases_;
  Buffer weights_, bias_;
};

}  // namespace fastinv
