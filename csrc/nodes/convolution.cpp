#include <algorithm>

#include "buffer.h"
#include "nodes.h"

namespace fastinv {

ConvolutionNode::ConvolutionNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                                 const Geometry& geometry, const float* weight, const float* bias, const Choice& choice,
                                 bool abreast, double* rounding, bool keep_weights)
    : Node(kernels, std::move(inputs), output, activation),
      geometry_(geometry),
      choice_(choice),
      convolution_(make_convolution(kernels, geometry, weight_at(weight, false), bias, choice, abreast, rounding)) {
  if (keep_weights) {
    const int64_t size = int64_t{geometry.in_channels} * geometry.out_channels / geometry.groups *
                         geometry.axis[0].kernel * geometry.axis[1].kernel;
    weight_.assign(weight, weight + size);
    bias_.resize(static_cast<size_t>(geometry.out_channels));
    if (bias) std::copy_n(bias, geometry.out_channels, bias_.begin());
  }
}

// PyTorch's weights are [O, I / groups, kh, kw], and [I, O / groups, kh, kw] when transposed; the adjoint swaps the
// roles of input and output channels.
WeightAt ConvolutionNode::weight_at(const float* weight, bool adjoint) const {
  const int groups = geometry_.groups, kh = geometry_.axis[0].kernel, kw = geometry_.axis[1].kernel;
  const int in = geometry_.in_channels / groups, out = geometry_.out_channels / groups;
  const bool input_major = geometry_.transposed;
  return [=](int group, int o, int i, int y, int x) {
    if (adjoint) std::swap(o, i);
    const int64_t row = input_major ? (int64_t{group} * in + i) * out + o : (int64_t{group} * out + o) * in + i;
    return weight[(row * kh + y) * kw + x];
  };
}

Operands ConvolutionNode::operands(const Frame& values, int64_t images) const {
  const int from = inputs[0], addend = inputs.size() > 1 ? inputs[1] : -1;
  return {values.at(from),
          values.stride[from],
          values.at(output),
          values.stride[output],
          addend < 0 ? nullptr : values.at(addend),
          addend < 0 ? 0 : values.stride[addend],
          images,
          activation,
          from == 0 ? values.ahead : 0,
          values.lanes};
}

bool ConvolutionNode::runs_abreast() const {
  return inputs.size() == 1 && convolution_->runs_abreast() && (!gradient_ || gradient_->runs_abreast());
}

void ConvolutionNode::forward(const Frame& values, int64_t images, Share share) const {
  convolution_->run(operands(values, images), share, values.scratch);
}

Rows ConvolutionNode::rows_read(size_t input, Rows rows) const {
  if (input > 0) return rows;
  // The last tile is a whole one, though not all of its rows may be there.
  const int whole = static_cast<int>(round_up(rows.end - rows.begin, row_step()));
  return {geometry_.first_row_read(rows.begin), geometry_.last_row_read(rows.begin + whole - 1) + 1};
}

void ConvolutionNode::forward_rows(const Frame& values, Rows rows) const {
  convolution_->run_rows(operands(values, 1), rows.begin, rows.end, values.scratch);
}

void ConvolutionNode::prepare_backward() {
  gradient_ = make_gradient(kernels, geometry_.adjoint(), weight_at(weight_.data(), true), choice_);
  if (!choice_.amx && inputs.size() == 1 && activation.kind == ActivationKind::kIdentity &&
      Quadratic::pays(geometry_)) {
    quadratic_ = std::make_unique<Quadratic>(kernels, geometry_, weight_at(weight_.data(), false), std::move(bias_));
  }
  weight_ = {};
  bias_ = {};
}

void ConvolutionNode::backward(const Frame&, const Frame& grads, int64_t images, size_t input, bool first,
                               Share share) const {
  const int target = inputs[input];
  if (input == 0) {
    float* to = grads.at(target);
    const int64_t step = grads.stride[target];
    gradient_->run(
        {grads.at(output), grads.stride[output], to, step, first ? nullptr : to, step, images, {}, 0, grads.lanes},
        share, grads.scratch);
    return;
  }
  const int64_t size = int64_t{geometry_.out_channels} * geometry_.axis[0].out * geometry_.axis[1].out;
  const int64_t begin = share.begin(size), count = share.end(size) - begin;
  for (int64_t i = 0; i < images; ++i) {
    const float* from = grads.at(output, i) + begin;
    float* to = grads.at(target, i) + begin;
    first ? void(std::copy_n(from, count, to)) : kernels.add(from, to, count);
  }
}

int64_t ConvolutionNode::scratch_floats(int64_t lanes) const {
  return std::max({convolution_->scratch_floats(lanes), gradient_ ? gradient_->scratch_floats(lanes) : 0,
                   quadratic_ ? quadratic_->at_zero_scratch_floats() : 0});
}

std::string ConvolutionNode::describe() const {
  std::string kernel = convolution_->algorithm() + (inputs.size() > 1 ? ", add" : "");
  return gradient_ ? kernel + "; back " + gradient_->algorithm() : kernel;
}

}  // namespace fastinv
