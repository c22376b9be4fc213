#include "quadratic.h"

#include <algorithm>
#include <cstring>

#include "cost.h"
#include "planar.h"

namespace fastinv {
namespace {

constexpr int64_t kMostWeights = 512 * 1024;  // floats; beyond that they would have to come from memory in each step

// Row taps that a tile takes at once, of so many: an odd number.
int taps_at_once(int taps) { return taps == 1 ? 1 : round_up(taps, 5) <= round_up(taps, 3) ? 5 : 3; }

// The taps through which results see this position of an axis: the first one, and how many.
struct Seen {
  int first, count;
  bool operator==(const Seen& other) const { return first == other.first && count == other.count; }
};

Seen seen(const Axis& axis, int position) {  // result position + padding − tap
  const int first = std::max(0, position + axis.padding - (axis.out - 1));
  const int last = std::min(axis.kernel - 1, position + axis.padding);
  return {first, std::max(0, last - first + 1)};
}

}  // namespace

bool Quadratic::pays(const Geometry& g) {
  const Axis &y = g.axis[0], &x = g.axis[1];
  const bool plain =
      !g.transposed && g.groups == 1 && y.stride == 1 && x.stride == 1 && y.dilation == 1 && x.dilation == 1;
  if (!plain || !Planar::applies(g.adjoint())) return false;
  const double results = double(y.out) * x.out / (double(y.in) * x.in);
  const int64_t taps = 2 * y.kernel - 1, offsets = 2 * (x.kernel * g.in_channels - 1) + 1;
  const int64_t bands = std::min(y.in, 2 * y.kernel - 1);
  return double(taps * offsets) < 2.0 * g.out_channels * y.kernel * x.kernel * results &&
         (taps + 4) * offsets * bands * round_up(int64_t{x.in} * g.in_channels, kLineFloats) <= kMostWeights;
}

Quadratic::Quadratic(const Kernels& kernels, const Geometry& g, const WeightAt& weight, std::vector<float> bias)
    : kernels_(kernels),
      geometry_(g),
      bias_(std::move(bias)),
      adjoint_(make_gradient(
          kernels, g.adjoint(),
          [&weight](int group, int o, int i, int y, int x) { return -2.0f * weight(group, i, o, y, x); }, true)) {
  const int in = g.in_channels, ky = g.axis[0].kernel, kx = g.axis[1].kernel, all = 2 * ky - 1;
  const int taps = taps_at_once(all);
  const int reach = kx * in - 1;
  for (int o = -reach; o <= reach; ++o) offsets_.push_back(o);
  row_ = int64_t{g.axis[1].in} * in;
  in_row_ = round_up(row_ + reach, kLineFloats);
  in_rows_ = g.axis[0].in + kMaxQuadraticRows + round_up(all, taps);

  // [row tap, column tap, channel] twice: products summed over the output channels.
  const int places = ky * kx * in;
  std::vector<double> products(static_cast<size_t>(places) * places, 0.0);
  std::vector<double> one(static_cast<size_t>(places));
  for (int o = 0; o < g.out_channels; ++o) {
    for (int p = 0; p < places; ++p) one[p] = weight(0, o, p % in, p / in / kx, p / in % kx);
    for (int p = 0; p < places; ++p) {
      for (int q = 0; q < places; ++q) products[static_cast<size_t>(p) * places + q] += one[p] * one[q];
    }
  }
  for (int y = 0; y < g.axis[0].in; ++y) {
    const bool inner = y > 1 && y + 1 < g.axis[0].in;  // TV differs in the first and the last row
    if (inner && seen(g.axis[0], y) == seen(g.axis[0], y - 1)) {
      ++bands_.back().rows;
      continue;
    }
    bands_.push_back({y, 1, 0, taps, ceil_div(all, taps), 0});
  }
  for (Band& band : bands_) {
    if (band.rows == 1) {  // its taps outside the image are left out
      const int below = g.axis[0].in - 1 - band.first;
      band.tap = std::max(0, ky - 1 - band.first);
      band.taps = 1;
      band.groups = ky + std::min(ky - 1, below) - band.tap;
    }
    band.weights = static_cast<int64_t>(packed_.size());
    add_weights(products, band);
  }
  weights_ = Buffer(static_cast<int64_t>(packed_.size()));
  std::copy(packed_.begin(), packed_.end(), weights_.data());
  packed_ = {};
  std::vector<float> negative;
  for (const float b : bias_) negative.insert(negative.end(), static_cast<size_t>(plane()), -b);
  of_bias_.resize(static_cast<size_t>(pixels()) * g.in_channels);
  adjoint_->run({negative.data(), 0, of_bias_.data(), 0, nullptr, 0, 1, {}}, {},
                Buffer(adjoint_->scratch_floats(1)).data());
}

int64_t Quadratic::at_zero_scratch_floats() const { return image_floats() + adjoint_->scratch_floats(1); }

double Quadratic::at_zero(const float* features, float* constant, float* scratch) const {
  double total = 0.0;
  for (int o = 0; o < geometry_.out_channels; ++o) {
    total += kernels_.squared_distance(features + o * plane(), bias_[static_cast<size_t>(o)], plane());
  }
  adjoint_->run({features, 0, scratch, 0, of_bias_.data(), 0, 1, {}}, {}, scratch + image_floats());
  kernels_.transpose(scratch, pixels(), constant, geometry_.in_channels, geometry_.in_channels, pixels());
  return total;
}

void Quadratic::add_weights(const std::vector<double>& products, const Band& band) {
  const int in = geometry_.in_channels;
  for (int64_t at = 0; at < row_; at += kernels_.width) {
    for (int tap = band.tap; tap < band.tap + band.groups * band.taps; tap += band.taps) {
      for (const int64_t offset : offsets_) {
        for (int t = tap; t < tap + band.taps; ++t) {
          for (int64_t i = at; i < at + kernels_.width; ++i) {
            const double value =
                i < row_ ? weight(products, band.first, static_cast<int>(i / in), static_cast<int>(i % in), t, offset)
                         : 0.0;
            packed_.push_back(static_cast<float>(2.0 * value));
          }
        }
      }
    }
  }
}

// AᵀA from this pixel and channel to what lies so many rows and floats on: the sum over the taps through which a result
// sees both.
double Quadratic::weight(const std::vector<double>& products, int row, int column, int channel, int tap,
                         int64_t offset) const {
  const Axis &y = geometry_.axis[0], &x = geometry_.axis[1];
  const int in = geometry_.in_channels, places = y.kernel * x.kernel * in;
  const int64_t to = offset + channel + int64_t{x.kernel} * in;  // from that many columns to the left
  const int dy = tap - (y.kernel - 1), dx = static_cast<int>(to / in) - x.kernel, other = static_cast<int>(to % in);
  const Seen rows = seen(y, row), columns = seen(x, column);
  double sum = 0.0;
  for (int u = rows.first; u < rows.first + rows.count; ++u) {
    if (u + dy < 0 || u + dy >= y.kernel) continue;
    for (int v = columns.first; v < columns.first + columns.count; ++v) {
      if (v + dx < 0 || v + dx >= x.kernel) continue;
      const int p = (u * x.kernel + v) * in + channel, q = ((u + dy) * x.kernel + v + dx) * in + other;
      sum += products[static_cast<size_t>(p) * static_cast<size_t>(places) + static_cast<size_t>(q)];
    }
  }
  return sum;
}

bool Quadratic::add_total_variation(double weight) {
  const int in = geometry_.in_channels, centre = geometry_.axis[0].kernel - 1, height = geometry_.axis[0].in;
  if (centre == 0 || geometry_.axis[1].kernel == 1) return false;
  const int count = static_cast<int>(offsets_.size()), middle = count / 2;
  for (const Band& band : bands_) {
    const int above = band.first > 0, below = band.first + 1 < height;
    for (int64_t i = 0; i < row_; ++i) {
      const int left = i >= in, right = i + in < row_, width = kernels_.width;
      const auto add = [&](int row_tap, int offset, double value) {
        const int tap = row_tap - band.tap;
        const int64_t place = (i / width * band.groups + tap / band.taps) * count + middle + offset;
        weights_[band.weights + (place * band.taps + tap % band.taps) * width + i % width] +=
            static_cast<float>(2.0 * weight * value);
      };
      add(centre, 0, above + below + left + right);
      if (above) add(centre - 1, 0, -1.0);
      if (below) add(centre + 1, 0, -1.0);
      if (left) add(centre, -in, -1.0);
      if (right) add(centre, in, -1.0);
    }
  }
  return true;
}

void Quadratic::gradient(const float* z, const float* constant, float* gradient, float* scratch) const {
  const Axis& rows = geometry_.axis[0];
  float* first = scratch + in_row_;  // of the copy's rows; row 0 of the image is row kernel − 1 there
  for (int y = 0; y < rows.in; ++y) {
    std::memcpy(first + (y + rows.kernel - 1) * in_row_, z + y * row_, static_cast<size_t>(row_) * sizeof(float));
  }
  for (const Band& band : bands_) {
    // Tiles of about the same size; the kernel has those of even numbers of rows.
    const int tiles = ceil_div(band.rows, kernels_.quadratic_rows), last = band.first + band.rows;
    const int size = static_cast<int>(round_up(ceil_div(band.rows, tiles), 2));
    for (int begin = band.first; begin < last; begin += size) {
      const int end = std::min(begin + size, last);
      kernels_.quadratic({first + (begin + band.tap) * in_row_, in_row_, constant + begin * row_,
                          gradient + begin * row_, row_, weights_.data() + band.weights, offsets_.data(),
                          static_cast<int32_t>(offsets_.size()), band.groups, band.taps, end - begin});
    }
  }
}

}  // namespace fastinv
