#include <algorithm>
#include <cstring>

#include "nodes.h"

namespace fastinv {

BinaryNode::BinaryNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                       const BinaryArgs& geometry, int64_t size_a, int64_t size_b)
    : Node(kernels, std::move(inputs), output, activation), geometry_(geometry), sizes_{size_a, size_b} {}

void BinaryNode::forward(const Frame& values, int64_t images, Share share) const {
  BinaryArgs args = geometry_;
  args.activation = activation;
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    args.a = values.at(inputs[0], i);
    args.b = values.at(inputs[1], i);
    args.out = values.at(output, i);
    kernels.binary(args);
  }
}

void BinaryNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                          Share) const {
  BinaryGradientArgs args = {};
  args.kind = geometry_.kind;
  args.rank = geometry_.rank;
  std::copy_n(geometry_.size, kMaxRank, args.size);
  std::copy_n(input == 0 ? geometry_.stride_a : geometry_.stride_b, kMaxRank, args.stride_a);
  std::copy_n(input == 0 ? geometry_.stride_b : geometry_.stride_a, kMaxRank, args.stride_b);
  for (int64_t i = 0; i < images; ++i) {
    args.grad_out = grads.at(output, i);
    args.grad_a = grads.at(inputs[input], i);
    args.b = values.at(inputs[1 - input], i);
    if (first) std::memset(args.grad_a, 0, static_cast<size_t>(sizes_[input]) * sizeof(float));
    kernels.binary_gradient(args);
  }
}

AffineNode::AffineNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                       int64_t outer, std::vector<float> scale, std::vector<float> shift, int height)
    : Node(kernels, std::move(inputs), output, activation),
      outer_(outer),
      scale_(std::move(scale)),
      shift_(std::move(shift)),
      height_(height) {}

void AffineNode::forward(const Frame& values, int64_t images, Share share) const {
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    kernels.affine({values.at(inputs[0], i), values.at(output, i), scale_.data(), shift_.data(), outer_,
                    static_cast<int64_t>(scale_.size()), false, activation});
  }
}

void AffineNode::forward_rows(const Frame& values, Rows rows) const {
  const int64_t size = static_cast<int64_t>(scale_.size()), pixels = outer_ / height_, at = rows.begin * pixels * size;
  kernels.affine({values.at(inputs[0]) + at, values.at(output) + at, scale_.data(), shift_.data(),
                  (rows.end - rows.begin) * pixels, size, false, activation});
}

void AffineNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share) const {
  const auto size = static_cast<int64_t>(scale_.size());
  for (int64_t i = 0; i < images; ++i) {
    kernels.affine({grads.at(output, i), grads.at(inputs[0], i), scale_.data(), nullptr, outer_, size, !first, {}});
  }
}

ActivationNode::ActivationNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation own,
                               int64_t size, int height)
    : Node(kernels, std::move(inputs), output, {}), own_(own), size_(size), height_(height) {}

void ActivationNode::forward(const Frame& values, int64_t images, Share share) const {
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    kernels.activate(values.at(inputs[0], i), values.at(output, i), size_ * values.lanes, own_);
  }
}

void ActivationNode::forward_rows(const Frame& values, Rows rows) const {
  const int64_t row = size_ / height_;
  kernels.activate(values.at(inputs[0]) + rows.begin * row, values.at(output) + rows.begin * row,
                   (rows.end - rows.begin) * row, own_);
}

void ActivationNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t, bool first,
                              Share) const {
  for (int64_t i = 0; i < images; ++i) {
    float* grad = grads.at(output, i);  // not read again after this
    const int64_t size = size_ * grads.lanes;
    kernels.activate_gradient(values.at(inputs[0], i), values.at(output, i), grad, size, own_);
    if (first) {
      std::copy_n(grad, size, grads.at(inputs[0], i));
    } else {
      kernels.add(grad, grads.at(inputs[0], i), size);
    }
  }
}

}  // namespace fastinv
