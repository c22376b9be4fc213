// A compiled dense or depthwise correlation: geometry resolved into offset tables, weights packed.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace fastinv {

// One axis of a correlation, 0 rows and 1 columns. Forward, tap k of output o reads input o·stride + k·dilation −
// padding; transposed, it reads (o + padding − k·dilation) / stride, where that is whole.
struct Axis {
  int in, out, kernel, stride, padding, dilation;
};

struct Geometry {
  Axis axis[2];
  int in_channels, out_channels, groups;
  bool transposed;

  // The geometry of the gradient to the input.
  Geometry adjoint() const;
};

// weight(group, output channel in the group, input channel in the group, row tap, column tap)
using WeightAt = std::function<float(int, int, int, int, int)>;

class Correlation {
 public:
  // `bias` is [out_channels] or null.
  Correlation(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias);

  // in [H, W, C] to out [H', W', C'], both of one image.
  void run(const float* in, float* out, bool accumulate, Activation activation) const;

  // What runs, for describe(): form and tile.
  std::string algorithm() const;

 private:
  enum class Form { kBroadcast, kDot, kDepthwise };
  struct Tap {
    int y, x;
    int32_t row;  // first weight row
  };
  struct Pixel {
    int y, x;
  };

  Form choose_form() const;
  int phases(int axis) const;
  void order_taps();
  void build_rows();
  void add_row(int phase, const std::vector<Pixel>& pixels, bool shared);
  void add_tiles(const std::vector<Tap>& taps, const std::vector<Pixel>& pixels, int first_y, int64_t out_base);
  void add_runs(const std::vector<Tap>& taps, const Pixel* pixels, int count, int first_y);
  void pack(const WeightAt& weight, const float* bias);
  int channels_per_row() const { return form_ == Form::kDepthwise ? 1 : geometry_.in_channels / geometry_.groups; }

  const Kernels& kernels_;
  Geometry geometry_;
  Form form_;
  int tile_pixels_;
  std::vector<std::vector<Tap>> phases_;  // taps of each sub-convolution, in the order of the input they read
  int64_t weight_rows_ = 0;
  std::vector<TileRow> rows_;
  std::vector<Tile> tiles_;
  std::vector<Run> runs_;
  std::map<std::vector<int>, std::pair<int32_t, int32_t>> shared_tiles_;  // while building
  int longest_run_ = 1;
  Buffer weights_, bias_, zeros_;
  int64_t group_weights_ = 0, group_bias_ = 0;
};

}  // namespace fastinv
