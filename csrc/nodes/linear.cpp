#include <algorithm>

#include "buffer.h"
#include "cost.h"
#include "nodes.h"

namespace fastinv {
namespace {

// Of weights at once, half of the smallest L2: 384 to 1,536 channels of 197 tokens took 2.9 ms all at once, on a Xeon.
constexpr int64_t kWeightBytes = 256 * 1024;

}  // namespace

// y = W·x + b for rows of x, as a correlation with one run: pixels of a tile are rows.
class LinearNode::Matrix {
 public:
  Matrix(const Kernels& kernels, int in, int out, const WeightAt& weight, const float* bias)
      : kernels_(kernels), in_(in), out_(out), dot_(out <= kMaxDotOutputs && in >= kernels.width) {
    // A 1×1 correlation over 1×1 images packs the same weights.
    pixels_ = dot_ ? kernels.dot_pixels[out] : kMaxTilePixels;
    block_ = dot_ ? 1 : kernels.max_vectors * kernels.width;
    const int padded = dot_ ? out : static_cast<int>(round_up(out, kernels.width));
    weights_ = Buffer(int64_t{in} * padded);
    for (int o = 0; o < out; ++o) {
      const int first = o / block_ * block_, span = std::min(block_, padded - first);
      for (int i = 0; i < in; ++i) {
        weights_[int64_t{first} * in + int64_t{i} * span + (o - first)] = weight(0, o, i, 0, 0);
      }
    }
    bias_ = Buffer(padded);
    if (bias) std::copy_n(bias, out, bias_.data());
  }

  // So many rows of each image, this share of them: of the outputs, each with its own weights; of the images where
  // these go round and those do not.
  void run(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t images,
           bool accumulate, Activation activation, Share share) const {
    const bool by_outputs = blocks() >= share.count || images < share.count;
    const Share whole = {}, of_images = by_outputs ? whole : share, of_outputs = by_outputs ? share : whole;
    const int first = static_cast<int>(of_outputs.begin(blocks())) * block_;
    const int last = std::min(out_, static_cast<int>(of_outputs.end(blocks())) * block_);
    const int64_t begin = of_images.begin(images), end = of_images.end(images);
    if (first >= last) return;
    if (rows == 1) return run_rows(in, in_stride, out, out_stride, begin, end, first, last, accumulate, activation);
    for (int64_t i = begin; i < end; ++i) {
      run_rows(in + i * in_stride, in_, out + i * out_stride, out_, 0, rows, first, last, accumulate, activation);
    }
  }

  bool dot() const { return dot_; }
  int blocks() const { return ceil_div(out_, block_); }  // of outputs

 private:
  // Rows begin to end, outputs first to last: row r is read at in + r·in_step and written at out + r·out_step. All rows
  // go through the weights of so many outputs as stay in the cache, and then through the next ones'.
  void run_rows(const float* in, int64_t in_step, float* out, int64_t out_step, int64_t begin, int64_t end, int first,
                int last, bool accumulate, Activation activation) const {
    const int outputs = block_ * std::max(1, static_cast<int>(kWeightBytes / (int64_t{4} * in_ * block_)));
    for (; first < last; first += outputs) {
      const int until = std::min(last, first + outputs);
      run_tiles(in, in_step, out + first, out_step, begin, end, first, until, accumulate, activation);
    }
  }

  void run_tiles(const float* in, int64_t in_step, float* out, int64_t out_step, int64_t begin, int64_t end, int first,
                 int last, bool accumulate, Activation activation) const {
    for (; begin < end; begin += pixels_) {
      Tile tile = {};
      Run run = {};
      tile.pixels = static_cast<int32_t>(std::min<int64_t>(pixels_, end - begin));
      tile.runs = 1;
      run.length = in_;
      for (int p = 0; p < tile.pixels; ++p) {
        run.offset[p] = static_cast<int32_t>(p * in_step);
        tile.out[p] = static_cast<int32_t>(p * out_step);
      }
      const TileRow row = {0, 1, begin * in_step, begin * out_step};
      const auto kernel = dot_ ? kernels_.correlate_dot : kernels_.correlate;
      kernel({in, out, nullptr, &row, 1, &tile, &run, weights_.data() + int64_t{first} * in_, in_, bias_.data() + first,
              last - first, accumulate ? out : nullptr, activation});
    }
  }

  const Kernels& kernels_;
  int in_, out_, pixels_, block_;
  bool dot_;
  Buffer weights_, bias_;
};

LinearNode::LinearNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t rows,
                       int in, int out, const float* weight, const float* bias, bool keep_weight)
    : Node(kernels, std::move(inputs), output, activation), rows_(rows), in_(in), out_(out) {
  const auto at = [weight, in](int, int o, int i, int, int) { return weight[int64_t{o} * in + i]; };
  matrix_ = std::make_shared<Matrix>(kernels, in, out, at, bias);
  if (keep_weight) weight_.assign(weight, weight + int64_t{in} * out);
}

void LinearNode::forward(const Frame& values, int64_t images, Share share) const {
  const int from = inputs[0], to = output;
  matrix_->run(values.at(from), values.stride[from], values.at(to), values.stride[to], rows_, images, false, activation,
               share);
}

void LinearNode::prepare_backward() {
  const auto at = [this](int, int o, int i, int, int) { return weight_[size_t(i) * size_t(in_) + size_t(o)]; };
  gradient_ = std::make_shared<Matrix>(kernels, out_, in_, at, nullptr);
  weight_ = {};
}

void LinearNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share share) const {
  const int from = output, to = inputs[0];
  gradient_->run(grads.at(from), grads.stride[from], grads.at(to), grads.stride[to], rows_, images, !first, {}, share);
}

bool LinearNode::shares_image() const { return matrix_->blocks() > 1; }

std::string LinearNode::describe() const { return matrix_->dot() ? "linear dot" : "linear broadcast"; }

}  // namespace fastinv
