#include "nodes.h"

namespace fastinv {

MaxPoolNode::MaxPoolNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                         const PoolArgs& geometry, bool row_major)
    : Node(kernels, std::move(inputs), output, activation), geometry_(geometry), row_major_(row_major) {}

bool MaxPoolNode::in_pairs(const PoolArgs& g) {
  const auto plain = [](const int32_t (&values)[2], int32_t value) { return values[0] == value && values[1] == value; };
  return plain(g.kernel, 2) && plain(g.stride, 2) && plain(g.padding, 0) && plain(g.dilation, 1) &&
         2 * g.out_h <= g.in_h && 2 * g.out_w <= g.in_w;
}

namespace {

// Calls body(arguments, first input, first output) for each stretch of an image that lies as [H, W, channels]: all of
// it, or, where planes of images abreast lie one after the other, each plane.
template <class Body>
void for_each_plane(PoolArgs pool, bool row_major, int64_t lanes, const Body& body) {
  const int planes = row_major ? pool.channels : 1;
  pool.channels = static_cast<int32_t>(pool.channels / planes * lanes);
  for (int64_t p = 0; p < planes; ++p) {
    body(pool, p * pool.in_h * pool.in_w * pool.channels, p * pool.out_h * pool.out_w * pool.channels);
  }
}

}  // namespace

void MaxPoolNode::forward(const Frame& values, int64_t images, Share share) const {
  PoolArgs args = geometry_;
  args.activation = activation;
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    args.in = values.at(inputs[0], i);
    args.out = values.at(output, i);
    args.index = values.saved ? values.saved + i * values.saved_stride : nullptr;
    if (row_major_ && values.lanes == 1) {
      kernels.max_pool_pairs(args);
      continue;
    }
    for_each_plane(args, row_major_, values.lanes, [&](PoolArgs plane, int64_t in, int64_t out) {
      plane.in += in;
      plane.out += out;
      if (plane.index) plane.index += out;
      kernels.max_pool(plane);
    });
  }
}

void MaxPoolNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t, bool first, Share) const {
  PoolArgs args = geometry_;
  for (int64_t i = 0; i < images; ++i) {
    args.index = values.saved + i * values.saved_stride;
    const float* from = grads.at(output, i);
    float* to = grads.at(inputs[0], i);
    if (row_major_ && grads.lanes == 1) {
      kernels.max_pool_pairs_gradient({args, from, to, !first});
      continue;
    }
    for_each_plane(args, row_major_, grads.lanes, [&](PoolArgs plane, int64_t in, int64_t out) {
      plane.index += out;
      kernels.max_pool_gradient({plane, from + out, to + in, !first});
    });
  }
}

SparseMatrix SparseMatrix::transposed() const {
  SparseMatrix t;
  t.columns = rows();
  t.first.assign(static_cast<size_t>(columns) + 1, 0);
  for (int32_t c : index) ++t.first[static_cast<size_t>(c) + 1];
  for (size_t c = 0; c < static_cast<size_t>(columns); ++c) t.first[c + 1] += t.first[c];
  t.index.resize(index.size());
  t.weight.resize(weight.size());
  std::vector<int32_t> next(t.first.begin(), t.first.end() - 1);
  for (int r = 0; r < rows(); ++r) {
    for (int32_t k = first[static_cast<size_t>(r)]; k < first[static_cast<size_t>(r) + 1]; ++k) {
      const auto at = static_cast<size_t>(next[static_cast<size_t>(index[static_cast<size_t>(k)])]++);
      t.index[at] = r;
      t.weight[at] = weight[static_cast<size_t>(k)];
    }
  }
  return t;
}

ResampleNode::ResampleNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                           int channels, SparseMatrix rows, SparseMatrix columns)
    : Node(kernels, std::move(inputs), output, activation),
      channels_(channels),
      rows_(std::move(rows)),
      columns_(std::move(columns)) {}

void ResampleNode::forward(const Frame& values, int64_t images, Share share) const {
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    kernels.resample({values.at(inputs[0], i), values.at(output, i), columns_.columns, rows_.rows(), columns_.rows(),
                      channels_ * static_cast<int>(values.lanes), rows_.view(), columns_.view(), false, activation});
  }
}

void ResampleNode::prepare_backward() {
  rows_transposed_ = rows_.transposed();
  columns_transposed_ = columns_.transposed();
}

void ResampleNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share) const {
  for (int64_t i = 0; i < images; ++i) {
    kernels.resample({grads.at(output, i),
                      grads.at(inputs[0], i),
                      columns_transposed_.columns,
                      rows_transposed_.rows(),
                      columns_transposed_.rows(),
                      channels_ * static_cast<int>(grads.lanes),
                      rows_transposed_.view(),
                      columns_transposed_.view(),
                      !first,
                      {}});
  }
}

}  // namespace fastinv
