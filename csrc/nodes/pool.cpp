#include <algorithm>

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

// What a worker does of one image: where its inputs and outputs begin, and a pool of its own there.
struct Part {
  PoolArgs pool;
  int64_t in = 0, out = 0;
};

// Rows of windows first to last of an image that lies as [H, W, C].
Part window_rows(const PoolArgs& pool, int64_t first, int64_t last) {
  const int64_t start = first * pool.stride[0] - pool.padding[0], begin = std::max<int64_t>(0, start);
  const int64_t reach = (last - first - 1) * pool.stride[0] + (pool.kernel[0] - 1) * pool.dilation[0] + 1;
  Part part = {pool, begin * pool.in_w * pool.channels, first * pool.out_w * pool.channels};
  part.pool.padding[0] = static_cast<int32_t>(begin - start);
  part.pool.in_h = static_cast<int32_t>(std::min<int64_t>(pool.in_h, start + reach) - begin);
  part.pool.out_h = static_cast<int32_t>(last - first);
  return part;
}

// Calls body(part) for each of so many planes, one after the other, from the first one's part.
template <class Body>
void for_each_plane(const PoolArgs& pool, int planes, Part part, const Body& body) {
  for (int p = 0; p < planes; ++p) {
    body(part);
    part.in += int64_t{pool.in_h} * pool.in_w * part.pool.channels;
    part.out += int64_t{pool.out_h} * pool.out_w * part.pool.channels;
  }
}

// Calls body(image, part) for this share of the images' rows, one image after the other. Planes of [C, H, W] are cut
// into rows as well, one by one: the layers around a pool are, and what this worker has made is in its cache. Images
// abreast are one of [H, W, C · lane], or planes of [H, W, lane].
template <class Body>
void for_each_part(const PoolArgs& pool, bool row_major, int64_t lanes, int64_t images, Share share, const Body& body) {
  const int planes = row_major ? pool.channels : 1;
  PoolArgs plane = pool;
  plane.channels = static_cast<int32_t>(pool.channels / planes * lanes);
  for_each_stretch(images, pool.out_h, share, [&](int64_t image, int64_t first, int64_t last) {
    const bool whole = last - first == pool.out_h;
    if (whole && lanes == 1) {
      body(image, Part{pool});
    } else {
      for_each_plane(plane, planes, whole ? Part{plane} : window_rows(plane, first, last),
                     [&](const Part& part) { body(image, part); });
    }
  });
}

}  // namespace

void MaxPoolNode::forward(const Frame& values, int64_t images, Share share) const {
  const auto kernel = row_major_ && values.lanes == 1 ? kernels.max_pool_pairs : kernels.max_pool;
  for_each_part(geometry_, row_major_, values.lanes, images, share, [&](int64_t image, const Part& part) {
    PoolArgs args = part.pool;
    args.activation = activation;
    args.in = values.at(inputs[0], image) + part.in;
    args.out = values.at(output, image) + part.out;
    if (values.saved) args.index = values.saved + image * values.saved_stride + part.out;
    kernel(args);
  });
}

// Whether windows cover the image side by side.
bool MaxPoolNode::shares_backward() const {
  const PoolArgs& g = geometry_;
  const auto tiles = [&g](int axis, int in, int out) {
    return g.kernel[axis] == g.stride[axis] && g.padding[axis] == 0 && g.dilation[axis] == 1 &&
           in == out * g.stride[axis];
  };
  return tiles(0, g.in_h, g.out_h) && tiles(1, g.in_w, g.out_w);
}

void MaxPoolNode::backward(const Frame& values, const Frame& grads, int64_t images, size_t, bool first,
                           Share share) const {
  const auto kernel = row_major_ && grads.lanes == 1 ? kernels.max_pool_pairs_gradient : kernels.max_pool_gradient;
  for_each_part(geometry_, row_major_, grads.lanes, images, share, [&](int64_t image, const Part& part) {
    PoolArgs args = part.pool;
    args.index = values.saved + image * values.saved_stride + part.out;
    kernel({args, grads.at(output, image) + part.out, grads.at(inputs[0], image) + part.in, !first});
  });
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
