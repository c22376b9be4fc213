#include "nodes.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"

namespace fastinv {

// ---- convolution
// ------------------------------------------------------------------------------------------------------

ConvolutionNode::ConvolutionNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                                 const Geometry& geometry, const float* weight, const float* bias, bool row_major,
                                 bool abreast, double* rounding, bool keep_weight)
    : Node(kernels, std::move(inputs), output, activation),
      geometry_(geometry),
      convolution_(make_convolution(kernels, geometry, weight_at(weight, false), bias, row_major, abreast, rounding)) {
  if (keep_weight) {
    const int64_t size = int64_t{geometry.in_channels} * geometry.out_channels / geometry.groups *
                         geometry.axis[0].kernel * geometry.axis[1].kernel;
    weight_.assign(weight, weight + size);
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
  gradient_ = make_gradient(kernels, geometry_.adjoint(), weight_at(weight_.data(), true), convolution_->row_major());
  if (inputs.size() == 1 && activation.kind == ActivationKind::kIdentity && Quadratic::pays(geometry_)) {
    quadratic_ = std::make_unique<Quadratic>(kernels, geometry_, weight_at(weight_.data(), false));
  }
  weight_ = {};
}

void ConvolutionNode::backward(const Frame&, const Frame& grads, int64_t images, size_t input, bool first,
                               Share share) const {
  const int target = inputs[input];
  if (input == 0) {
    float* to = grads.at(target);
    const int64_t step = grads.stride[target];
    gradient_->run({grads.at(output), grads.stride[output], to, step, first ? nullptr : to, step, images, {}, 0,
                    grads.lanes},
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
  return std::max(convolution_->scratch_floats(lanes), gradient_ ? gradient_->scratch_floats(lanes) : 0);
}

std::string ConvolutionNode::describe() const {
  std::string kernel = convolution_->algorithm() + (inputs.size() > 1 ? ", add" : "");
  return gradient_ ? kernel + "; back " + gradient_->algorithm() : kernel;
}

// ---- linear
// -------------------------------------------------------------------------------------------------------------

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

// ---- pooling and resampling -----------------------------------------------------------------------------------------

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

// ---- rearranging
// ------------------------------------------------------------------------------------------------------

GatherNode::GatherNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                       std::vector<int32_t> index)
    : Node(kernels, std::move(inputs), output, activation), index_(std::move(index)) {}

void GatherNode::forward(const Frame& values, int64_t images, Share share) const {
  const auto size = static_cast<int64_t>(index_.size());
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    float* out = values.at(output, i);
    kernels.gather(values.at(inputs[0], i), index_.data(), out, size, false);
    if (activation.kind != ActivationKind::kIdentity) kernels.activate(out, out, size, activation);
  }
}

void GatherNode::prepare_backward() {
  inverse_.resize(index_.size());
  for (size_t i = 0; i < index_.size(); ++i) inverse_[static_cast<size_t>(index_[i])] = static_cast<int32_t>(i);
}

void GatherNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share) const {
  const auto size = static_cast<int64_t>(inverse_.size());
  for (int64_t i = 0; i < images; ++i) {
    kernels.gather(grads.at(output, i), inverse_.data(), grads.at(inputs[0], i), size, !first);
  }
}

ConcatNode::ConcatNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                       int64_t outer, std::vector<int64_t> chunks)
    : Node(kernels, std::move(inputs), output, activation), outer_(outer), chunks_(std::move(chunks)), total_(0) {
  for (int64_t chunk : chunks_) total_ += chunk;
}

void ConcatNode::forward(const Frame& values, int64_t images, Share share) const {
  for (int64_t i = share.begin(images); i < share.end(images); ++i) {
    float* out = values.at(output, i);
    int64_t at = 0;
    for (size_t k = 0; k < chunks_.size(); at += chunks_[k++]) {
      const float* in = values.at(inputs[k], i);
      for (int64_t o = 0; o < outer_; ++o) {
        std::memcpy(out + o * total_ + at, in + o * chunks_[k], static_cast<size_t>(chunks_[k]) * sizeof(float));
      }
    }
    if (activation.kind != ActivationKind::kIdentity) kernels.activate(out, out, outer_ * total_, activation);
  }
}

void ConcatNode::backward(const Frame&, const Frame& grads, int64_t images, size_t input, bool first, Share) const {
  int64_t at = 0;
  for (size_t k = 0; k < input; ++k) at += chunks_[k];
  const int64_t chunk = chunks_[input];
  for (int64_t i = 0; i < images; ++i) {
    const float* from = grads.at(output, i) + at;
    float* to = grads.at(inputs[input], i);
    for (int64_t o = 0; o < outer_; ++o, from += total_, to += chunk) {
      if (first) {
        std::memcpy(to, from, static_cast<size_t>(chunk) * sizeof(float));
      } else {
        kernels.add(from, to, chunk);
      }
    }
  }
}

// ---- elementwise
// ------------------------------------------------------------------------------------------------------

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

LayoutNode::LayoutNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation, int64_t rows,
                       int64_t columns, bool to_channels_last, int height)
    : Node(kernels, std::move(inputs), output, activation),
      rows_(rows),
      columns_(columns),
      to_channels_last_(to_channels_last),
      height_(height) {}

namespace {

// A matrix of rows × columns turned over, each element so many floats.
void turn_over(const float* in, float* out, int64_t rows, int64_t columns, int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) std::copy_n(in + (r * columns + c) * lanes, lanes, out + (c * rows + r) * lanes);
  }
}

}  // namespace

void LayoutNode::forward(const Frame& values, int64_t images, Share share) const {
  if (rows_ == 1 || columns_ == 1) {
    for (int64_t i = share.begin(images); i < share.end(images); ++i) {
      std::copy_n(values.at(inputs[0], i), rows_ * columns_ * values.lanes, values.at(output, i));
    }
    return;
  }
  if (values.lanes > 1) return turn_over(values.at(inputs[0]), values.at(output), rows_, columns_, values.lanes);
  // The longer side is shared out, a cache line at a time.
  const bool by_row = rows_ > columns_;
  const int64_t lines = (std::max(rows_, columns_) + kLineFloats - 1) / kLineFloats;
  for (int64_t at = share.begin(images * lines); at < share.end(images * lines);) {
    const int64_t image = at / lines, until = std::min(share.end(images * lines), (image + 1) * lines);
    const int64_t begin = (at - image * lines) * kLineFloats;
    const int64_t end = std::min((until - image * lines) * kLineFloats, std::max(rows_, columns_));
    const float* in = values.at(inputs[0], image);
    float* out = values.at(output, image);
    if (by_row) {
      kernels.transpose(in + begin * columns_, columns_, out + begin, rows_, end - begin, columns_);
    } else {
      kernels.transpose(in + begin, columns_, out + begin * rows_, rows_, rows_, end - begin);
    }
    at = until;
  }
}

void LayoutNode::forward_rows(const Frame& values, Rows rows) const {
  const int64_t channels = to_channels_last_ ? rows_ : columns_, pixels = to_channels_last_ ? columns_ : rows_;
  const int64_t width = pixels / height_, first = rows.begin * width, count = (rows.end - rows.begin) * width;
  const float* in = values.at(inputs[0]);
  float* out = values.at(output);
  if (to_channels_last_) {
    kernels.transpose(in + first, pixels, out + first * channels, channels, channels, count);
  } else {
    kernels.transpose(in + first * channels, channels, out + first, pixels, count, channels);
  }
}

void LayoutNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share) const {
  for (int64_t i = 0; i < images; ++i) {
    const float* from = grads.at(output, i);
    float* to = first ? grads.at(inputs[0], i) : grads.scratch;
    if (grads.lanes > 1) {
      turn_over(from, to, columns_, rows_, grads.lanes);
    } else {
      kernels.transpose(from, rows_, to, columns_, columns_, rows_);
    }
    if (!first) kernels.add(to, grads.at(inputs[0], i), rows_ * columns_ * grads.lanes);
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
