#include "nodes.h"

namespace fastinv {

NormalizeNode::NormalizeNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                             const NormalizeArgs& geometry, std::vector<float> weight, std::vector<float> bias,
                             int height)
    : Node(kernels, std::move(inputs), output, activation),
      geometry_(geometry),
      weight_(std::move(weight)),
      bias_(std::move(bias)),
      height_(height) {
  geometry_.weight = weight_.data();
  geometry_.bias = bias_.data();
}

int64_t NormalizeNode::scratch_floats(int64_t) const {
  return geometry_.spatial ? int64_t{kNormalizeScratch} * geometry_.channels : 0;
}

int64_t NormalizeNode::saved_floats() const {
  return 2 * (geometry_.spatial ? int64_t{geometry_.groups} : geometry_.rows * geometry_.groups);
}

// Calls body(image, part) for this share of the rows, or groups, of all images.
template <class Body>
void NormalizeNode::for_each_part(int64_t images, Share share, const Body& body) const {
  for_each_stretch(images, units(), share, [&](int64_t image, int64_t first, int64_t last) {
    NormalizeArgs part = geometry_;
    part.first = first;
    part.last = last;
    body(image, part);
  });
}

void NormalizeNode::forward(const Frame& values, int64_t images, Share share) const {
  for_each_part(images, share, [&](int64_t image, NormalizeArgs& args) {
    args.in = values.at(inputs[0], image);
    args.out = values.at(output, image);
    args.activation = activation;
    args.statistics = values.saved ? values.saved + image * values.saved_stride : nullptr;
    args.scratch = values.scratch;
    kernels.normalize(args);
  });
}

void NormalizeNode::forward_rows(const Frame& values, Rows rows) const {
  const int64_t pixels = geometry_.rows / height_;
  NormalizeArgs args = geometry_;
  args.in = values.at(inputs[0]);
  args.out = values.at(output);
  args.first = rows.begin * pixels;
  args.last = rows.end * pixels;
  args.activation = activation;
  kernels.normalize(args);
}

void NormalizeNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t, bool first,
                             Share share) const {
  for_each_part(images, share, [&](int64_t image, NormalizeArgs& args) {
    args.in = values.at(inputs[0], image);
    args.statistics = values.saved + image * values.saved_stride;
    args.scratch = grads.scratch;
    kernels.normalize_gradient({args, grads.at(output, image), grads.at(inputs[0], image), !first});
  });
}

}  // namespace fastinv
