#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "buffer.h"
#include "nodes.h"

namespace fastinv {

namespace {

// The most elements that a permutation moves together, everywhere from a multiple of so many to another.
int64_t run_of(const std::vector<int32_t>& index) {
  int64_t run = static_cast<int64_t>(index.size());
  for (size_t i = 0, begin = 0; i < index.size(); ++i) {
    if (i > 0 && index[i] == index[i - 1] + 1) continue;
    run = std::gcd(run, std::gcd(static_cast<int64_t>(i - begin), static_cast<int64_t>(index[i])));
    begin = i;
  }
  return std::max<int64_t>(run, 1);
}

}  // namespace

// Whether element [m][c][r] of the result is element [m][r][c] of the input, and of what sizes.
GatherNode::Matrices GatherNode::matrices_of(const std::vector<int32_t>& index) {
  const auto size = static_cast<int64_t>(index.size());
  if (size < 2 || index[0] != 0 || index[1] < 2) return {};
  const int64_t columns = index[1];
  int64_t rows = 1;
  while (rows < size && index[static_cast<size_t>(rows)] == rows * columns) ++rows;
  if (size % (rows * columns) != 0) return {};
  for (int64_t i = 0; i < size; ++i) {
    const int64_t matrix = i / (rows * columns), within = i % (rows * columns);
    const int64_t from = matrix * rows * columns + within % rows * columns + within / rows;
    if (index[static_cast<size_t>(i)] != from) return {};
  }
  return {size / (rows * columns), rows, columns};
}

GatherNode::GatherNode(const Kernels& kernels, std::vector<int> inputs, int output, Activation activation,
                       const std::vector<int32_t>& index)
    : Node(kernels, std::move(inputs), output, activation), turned_(matrices_of(index)), run_(run_of(index)) {
  constexpr int64_t kShortest = 8;  // runs of fewer are quicker one by one
  if (run_ < kShortest) run_ = 1;
  for (size_t i = 0; i < index.size(); i += static_cast<size_t>(run_)) {
    index_.push_back(static_cast<int32_t>(index[i] / run_));
  }
}

std::string GatherNode::describe() const {
  if (turned_.count > 0) return "gather turned";
  return run_ > 1 ? "gather runs" : "gather";
}

template <class At>
void GatherNode::gather(const std::vector<int32_t>& index, const Matrices& turned, int64_t images, Share share,
                        bool accumulate, Activation act, At at) const {
  const auto activate = [&](float* out, int64_t size) {
    if (act.kind != ActivationKind::kIdentity) kernels.activate(out, out, size, act);
  };
  if (turned.count > 0 && !accumulate) {
    const int64_t rows = turned.rows, columns = turned.columns, lines = (columns + kLineFloats - 1) / kLineFloats;
    for_each_stretch(images, turned.count * lines, share, [&](int64_t image, int64_t first, int64_t last) {
      const auto [in, out] = at(image);
      for (int64_t unit = first; unit < last;) {
        const int64_t until = std::min(last, (unit / lines + 1) * lines), matrix = unit / lines * rows * columns;
        const int64_t begin = unit % lines * kLineFloats;
        const int64_t end = std::min(columns, begin + (until - unit) * kLineFloats);
        float* to = out + matrix + begin * rows;
        kernels.transpose(in + matrix + begin, columns, to, rows, rows, end - begin);
        activate(to, (end - begin) * rows);
        unit = until;
      }
    });
    return;
  }
  for_each_stretch(images, static_cast<int64_t>(index.size()), share, [&](int64_t image, int64_t first, int64_t last) {
    const auto [in, to] = at(image);
    float* out = to + first * run_;
    if (run_ == 1) kernels.gather(in, index.data() + first, out, last - first, accumulate);
    for (int64_t i = first; run_ > 1 && i < last; ++i) {
      const float* from = in + index[static_cast<size_t>(i)] * run_;
      float* into = to + i * run_;
      if (accumulate) {
        kernels.add(from, into, run_);
      } else {
        std::memcpy(into, from, static_cast<size_t>(run_) * sizeof(float));
      }
    }
    activate(out, (last - first) * run_);
  });
}

void GatherNode::forward(const Frame& values, int64_t images, Share share) const {
  gather(index_, turned_, images, share, false, activation,
         [&](int64_t i) { return std::pair(values.at(inputs[0], i), values.at(output, i)); });
}

void GatherNode::prepare_backward() {
  inverse_.resize(index_.size());
  for (size_t i = 0; i < index_.size(); ++i) inverse_[static_cast<size_t>(index_[i])] = static_cast<int32_t>(i);
}

void GatherNode::backward(const Frame&, const Frame& grads, int64_t images, size_t, bool first, Share share) const {
  const Matrices back = {turned_.count, turned_.columns, turned_.rows};
  gather(inverse_, back, images, share, !first, {},
         [&](int64_t i) { return std::pair(grads.at(output, i), grads.at(inputs[0], i)); });
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
