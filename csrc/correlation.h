// A compiled dense correlation: geometry resolved into offset tables, weights packed.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "convolution.h"
#include "kernels.h"

namespace fastinv {

class Correlation : public Convolution {
 public:
  // `bias` is [out_channels] or null.
  Correlation(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  void run(const Operands& operands, Share share, float* scratch) const override;
  bool runs_abreast() const override { return true; }
  int row_step() const override { return by_row_ ? 1 : 0; }
  void run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const override;
  std::string algorithm() const override;

 private:
  enum class Form { kBroadcast, kDot };
  struct Tap {
    int y, x;
    int32_t row;  // first weight row
  };
  struct Pixel {
    int y, x;
  };

  Form choose_form() const;
  void order_taps();
  void build_rows();
  void measure_rows();
  int64_t first_row(int64_t products) const;
  void run_tiles(const Operands& operands, int64_t image, int64_t first, int64_t count) const;
  void add_row(int phase, const std::vector<Pixel>& pixels, bool shared);
  void add_tiles(const std::vector<Tap>& taps, const std::vector<Pixel>& pixels, int first_y, int64_t out_base);
  void add_runs(const std::vector<Tap>& taps, const Pixel* pixels, int count, int first_y);
  void pack(const WeightAt& weight, const float* bias);

  const Kernels& kernels_;
  Geometry geometry_;
  Form form_;
  int tile_pixels_;
  std::vector<std::vector<Tap>> phases_;  // taps of each sub-convolution, in the order of the input they read
  int64_t weight_rows_ = 0;
  std::vector<TileRow> rows_;
  bool by_row_ = true;         // each of them lies in one row of the image
  std::vector<int64_t> work_;  // products of the rows before each, and of all
  std::vector<Tile> tiles_;
  std::vector<Run> runs_;
  std::map<std::vector<int>, std::pair<int32_t, int32_t>> shared_tiles_;  // while building
  int longest_run_ = 1;
  Buffer weights_, bias_, zeros_;
  int64_t group_weights_ = 0, group_bias_ = 0;
};

}  // namespace fastinv
