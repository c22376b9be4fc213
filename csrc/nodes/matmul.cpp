#include <algorithm>

#include "nodes.h"

namespace fastinv {
namespace {

constexpr int64_t kRows = 96;  // of a block: b is turned over for each, which takes as long as some of its products

int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

}  // namespace

MatmulNode::MatmulNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                       const Geometry& geometry)
    : Node(kernels, std::move(inputs), output, activation), geometry_(geometry) {}

// Units first to last of [group][block of rows].
void MatmulNode::multiply(const Product& p, float* scratch, int64_t first, int64_t last) const {
  const int64_t blocks = blocks_of(p.rows), a_size = p.rows * p.depth, b_size = p.depth * p.columns;
  int64_t turned = -1;  // the group whose b is in the scratch memory
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t group = unit / blocks, row = unit % blocks * kRows;
    const float* b = p.b + group * b_size;
    if (p.b_turned) {
      if (group != turned) kernels.transpose(b, p.depth, scratch, p.columns, p.columns, p.depth);
      b = scratch;
      turned = group;
    }
    const float* a = p.a + group * a_size + row * (p.a_turned ? 1 : p.depth);
    const int64_t a_row = p.a_turned ? 1 : p.depth, a_step = p.a_turned ? p.rows : 1;
    float* c = p.c + (group * p.rows + row) * p.columns;
    kernels.matmul({std::min(kRows, p.rows - row), p.columns, p.depth, a, a_row, a_step, b, p.columns, c, p.columns,
                    p.accumulate});
  }
}

MatmulNode::Product MatmulNode::forward_product(const Frame& values, int64_t image) const {
  const Geometry& g = geometry_;
  return {values.at(inputs[0], image),
          values.at(inputs[1], image),
          values.at(output, image),
          g.rows,
          g.columns,
          g.depth,
          false,
          g.transposed,
          false};
}

// Of y = a · b: a's is y's times bᵀ, b's is aᵀ times y's; of y = a · bᵀ: y's times b, and y's turned over times a.
MatmulNode::Product MatmulNode::gradient_product(const Frame& values, const Frame& grads, int64_t image,
                                                 size_t input) const {
  const Geometry& g = geometry_;
  const float *a = values.at(inputs[0], image), *b = values.at(inputs[1], image), *y = grads.at(output, image);
  float* into = grads.at(inputs[input], image);
  if (input == 0) return {y, b, into, g.rows, g.depth, g.columns, false, !g.transposed, false};
  if (g.transposed) return {y, a, into, g.columns, g.depth, g.rows, true, false, false};
  return {a, y, into, g.depth, g.columns, g.rows, true, false, false};
}

void MatmulNode::forward(const Frame& values, int64_t images, Share share) const {
  for_each_stretch(
      images, geometry_.groups * blocks_of(geometry_.rows), share, [&](int64_t image, int64_t first, int64_t last) {
        const Product product = forward_product(values, image);
        multiply(product, values.scratch, first, last);
        if (activation.kind == ActivationKind::kIdentity) return;
        const int64_t blocks = blocks_of(product.rows);
        const auto row = [&](int64_t unit) { return unit / blocks * product.rows + unit % blocks * kRows; };
        const int64_t begin = row(first) * product.columns, end = row(last) * product.columns;
        kernels.activate(product.c + begin, product.c + begin, end - begin, activation);
      });
}

void MatmulNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t input, bool first,
                          Share share) const {
  const int64_t rows = gradient_product(values, grads, 0, input).rows;
  for_each_stretch(images, geometry_.groups * blocks_of(rows), share, [&](int64_t image, int64_t begin, int64_t end) {
    Product product = gradient_product(values, grads, image, input);
    product.accumulate = !first;
    multiply(product, grads.scratch, begin, end);
  });
}

SoftmaxNode::SoftmaxNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                         int64_t rows, int64_t columns)
    : Node(kernels, std::move(inputs), output, activation), rows_(rows), columns_(columns) {}

void SoftmaxNode::forward(const Frame& values, int64_t images, Share share) const {
  for_each_stretch(images, rows_, share, [&](int64_t image, int64_t first, int64_t last) {
    const int64_t at = first * columns_;
    kernels.softmax({values.at(inputs[0], image) + at, values.at(output, image) + at, last - first, columns_});
  });
}

void SoftmaxNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t, bool first,
                           Share share) const {
  for_each_stretch(images, rows_, share, [&](int64_t image, int64_t begin, int64_t end) {
    const int64_t at = begin * columns_;
    kernels.softmax_gradient({values.at(output, image) + at, grads.at(output, image) + at,
                              grads.at(inputs[0], image) + at, end - begin, columns_, !first});
  });
}

}  // namespace fastinv
