#include "buffer.h"
#include "nodes.h"

namespace fastinv {

AttentionNode::AttentionNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                             const AttentionArgs& geometry, std::vector<float> bias)
    : Node(kernels, std::move(inputs), output, activation), geometry_(geometry), bias_(std::move(bias)) {
  geometry_.bias = bias_.empty() ? nullptr : bias_.data();
}

int64_t AttentionNode::scratch_floats(int64_t) const {
  const AttentionArgs& g = geometry_;
  return attention_scratch(round_up(g.keys, kernels.width), g.channels, g.value_channels);
}

AttentionArgs AttentionNode::args(const Frame& values, int64_t image, float* scratch, int64_t first,
                                  int64_t last) const {
  AttentionArgs args = geometry_;
  args.q = values.at(inputs[0], image);
  args.k = values.at(inputs[1], image);
  args.v = values.at(inputs[2], image);
  args.scratch = scratch;
  args.first = first;
  args.last = last;
  return args;
}

void AttentionNode::forward(const Frame& values, int64_t images, Share share) const {
  const int64_t units = int64_t{geometry_.windows} * geometry_.heads * geometry_.blocks;
  for_each_stretch(images, units, share, [&](int64_t image, int64_t first, int64_t last) {
    AttentionArgs part = args(values, image, values.scratch, first, last);
    part.out = values.at(output, image);
    part.activation = activation;
    kernels.attention(part);
  });
}

void AttentionNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                             Share share) const {
  const int64_t blocks = input == 0 ? geometry_.blocks : 1;
  for_each_stretch(images, int64_t{geometry_.windows} * geometry_.heads * blocks, share,
                   [&](int64_t image, int64_t begin, int64_t end) {
                     const AttentionArgs part = args(values, image, grads.scratch, begin, end);
                     kernels.attention_gradient({part, static_cast<int>(input), grads.at(output, image),
                                                 grads.at(inputs[input], image), !first});
                   });
}

}  // namespace fastinv
