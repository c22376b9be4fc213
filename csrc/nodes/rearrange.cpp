#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "nodes.h"

namespace fastinv {

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
    for (int64_t c = 0; c < columns; ++c)
      std::copy_n(in + (r * columns + c) * lanes, lanes, out + (c * rows + r) * lanes);
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

}  // namespace fastinv
