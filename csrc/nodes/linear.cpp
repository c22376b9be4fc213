#include <algorithm>

#include "buffer.h"
#include "nodes.h"

namespace fastinv {

// y = W·x + b for rows of x, as a correlation with one run: pixels of a tile are rows.
class LinearNode::Matrix {
 public:
  Matrix(const Kernels& kernels, int in, int out, const WeightAt& weight, const float* bias)
      : kernels_(kernels), in_(in), dot_(out <= kMaxDotOutputs && in >= kernels.width) {
    // A 1×1 correlation over 1×1 images packs the same weights.
    out_ = out;
    pixels_ = dot_ ? kernels.dot_pixels[out] : kMaxTilePixels;
    const int padded = dot_ ? out : static_cast<int>(round_up(out, kernels.width));
    const int block = dot_ ? 1 : kernels.max_vectors * kernels.width;
    weights_ = Buffer(int64_t{in} * padded);
    for (int o = 0; o < out; ++o) {
      const int first = o / block * block, span = std::min(block, padded - first);
      for (int i = 0; i < in; ++i) {
        weights_[int64_t{first} * in + int64_t{i} * span + (o - first)] = weight(0, o, i, 0, 0);
      }
    }
    bias_ = Buffer(padded);
    if (bias) std::copy_n(bias, out, bias_.data());
  }

  // Rows first to last: row r is read at in + r·in_step and written at out + r·out_step.
  void run(const float* in, int64_t in_step, float* out, int64_t out_step, int64_t first, int64_t last, bool accumulate,
           Activation activation) const {
    for (int64_t begin = first; begin < last; begin += pixels_) {
      Tile tile = {};
      Run run = {};
      tile.pixels = static_cast<int32_t>(std::min<int64_t>(pixels_, last - begin));
      tile.runs = 1;
      run.length = in_;
      for (int p = 0; p < tile.pixels; ++p) {
        run.offset[p] = static_cast<int32_t>(p * in_step);
        tile.out[p] = static_cast<int32_t>(p * out_step);
      }
      const TileRow row = {0, 1, begin * in_step, begin * out_step};
      const auto kernel = dot_ ? kernels_.correlate_dot : kernels_.correlate;
      kernel({in, out, nullptr, &row, 1, &tile, &run, weights_.data(), in_, bias_.data(), out_,
              accumulate ? out : nullptr, activation});
    }
  }

  bool dot() const { return dot_; }

 private:
  const Kernels& kernels_;
  int in_, out_, pixels_;
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
  if (rows_ == 1) {
    matrix_->run(values.at(inputs[0]), values.stride[inputs[0]], values.at(output), values.stride[output],
                 share.begin(images), share.end(images), false, activation);
    return;
  }
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    matrix_->run(values.at(inputs[0], i), in_, values.at(output, i), out_, 0, rows_, false, activation);
  }
}

void LinearNode::prepare_backward() {
  const auto at = [this](int, int o, int i, int, int) { return weight_[size_t(i) * size_t(in_) + size_t(o)]; };
  gradient_ = std::make_shared<Matrix>(kernels, out_, in_, at, nullptr);
  weight_ = {};
}

void LinearNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share) const {
  const int from = output, to = inputs[0];
  if (rows_ == 1) {
    gradient_->run(grads.at(from), grads.stride[from], grads.at(to), grads.stride[to], 0, images, !first, {});
    return;
  }
  for (int64_t i = 0; i < images; ++i) {
    gradient_->run(grads.at(from, i), out_, grads.at(to, i), in_, 0, rows_, !first, {});
  }
}

std::string LinearNode::describe() const { return matrix_->dot() ? "linear dot" : "linear broadcast"; }

}  // namespace fastinv
