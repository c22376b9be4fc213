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
      adjoint_(
          make_gradient(kernels, g.adjoint(),
                        [&weight](int group, int o, int i, int y, int x) { return -2.0f * weight(group, i, o, y, x); },
                        {{true, true}})) {
  const int in = g.in_channels, ky = g.axis[0].kernel, kx = g.axis[1].kernel, all = 2 * ky - 1;
  reach_ = kx * in - 1;
  row_ = int64_t{g.axis[1].in} * in;
  in_row_ = round_up(row_ + reach_, kLineFloats);
  in_rows_ = g.axis[0].in + kMaxQuadraticRows + round_up(all, taps_at_once(all));

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
  plan_bands();
  for (const Band& band : bands_) {
    for (int row = band.first; row < band.first + band.different(); ++row) {
      const int outside = std::max(0, ky - 1 - row), below = g.axis[0].in - 1 - row;
      const int first = band.taps == 0 ? outside : 0, last = band.taps == 0 ? std::min(all, ky + below) : all;
      for (int64_t i = 0; i < row_; ++i) {
        const int column = static_cast<int>(i / in), channel = static_cast<int>(i % in);
        for (int tap = first; tap < last; ++tap) {
          for (int offset = -reach_; offset <= reach_; ++offset) {
            weight_at(band, row, i, tap, offset) =
                static_cast<float>(2.0 * this->weight(products, row, column, channel, tap, offset));
          }
        }
      }
    }
  }
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

void Quadratic::plan_bands() {
  const Axis& y = geometry_.axis[0];
  const int all = 2 * y.kernel - 1, taps = taps_at_once(all);
  for (int row = 0; row < y.in; ++row) {
    const bool inner = row > 1 && row + 1 < y.in;  // TV differs in the first and the last row
    if (inner && seen(y, row) == seen(y, row - 1)) {
      ++bands_.back().rows;
    } else {
      bands_.push_back({row, 1, 0, taps, ceil_div(all, taps), 0});
    }
  }
  // Rows with weights of their own: taps outside the image are left out.
  std::vector<Band> planned;
  for (Band band : bands_) {
    const bool joins = band.rows == 1 && !planned.empty() && planned.back().taps == 0 &&
                       planned.back().rows < kMaxDifferentRows &&
                       planned.back().first + planned.back().rows == band.first;
    if (band.rows == 1) band.taps = 0;
    if (joins) {
      ++planned.back().rows;
    } else {
      planned.push_back(band);
    }
  }
  bands_ = std::move(planned);
  int64_t total = 0;
  for (Band& band : bands_) {
    if (band.taps == 0) {
      band.tap = std::max(0, y.kernel - 1 - band.first);
      const int last = std::min(band.first + band.rows - 1 + y.kernel, y.in);  // row of z
      band.groups = last - (band.first + band.tap - (y.kernel - 1));
    }
    band.weights = total;
    total += round_up(row_, kernels_.width) * band.groups * (2 * reach_ + 1) * band.abreast();
  }
  weights_ = Buffer(total);
}

float& Quadratic::weight_at(const Band& band, int row, int64_t i, int tap, int offset) {
  const int own = band.taps == 0 ? row - band.first : 0, from = tap + own - band.tap;
  const int group = band.taps == 0 ? from : from / band.taps, member = band.taps == 0 ? own : from % band.taps;
  const int64_t place = (i / kernels_.width * band.groups + group) * (2 * reach_ + 1) + reach_ + offset;
  return weights_[band.weights + (place * band.abreast() + member) * kernels_.width + i % kernels_.width];
}

// AᵀA from this pixel and channel to what lies so many rows and floats on: the sum over the taps through which a result
// sees both.
double Quadratic::weight(const std::vector<double>& products, int row, int column, int channel, int tap,
                         int offset) const {
  const Axis &y = geometry_.axis[0], &x = geometry_.axis[1];
  const int in = geometry_.in_channels, places = y.kernel * x.kernel * in;
  const int to = offset + channel + x.kernel * in;  // from that many columns to the left
  const int dy = tap - (y.kernel - 1), dx = to / in - x.kernel, other = to % in;
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
  for (const Band& band : bands_) {
    for (int row = band.first; row < band.first + band.different(); ++row) {
      const int above = row > 0, below = row + 1 < height;
      for (int64_t i = 0; i < row_; ++i) {
        const int left = i >= in, right = i + in < row_;
        const auto add = [&](int tap, int offset, double value) {
          weight_at(band, row, i, tap, offset) += static_cast<float>(2.0 * weight * value);
        };
        add(centre, 0, above + below + left + right);
        if (above) add(centre - 1, 0, -1.0);
        if (below) add(centre + 1, 0, -1.0);
        if (left) add(centre, -in, -1.0);
        if (right) add(centre, in, -1.0);
      }
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
      kernels_.quadratic({first + (begin + band.tap) * in_row_ - reach_, in_row_, constant + begin * row_,
                          gradient + begin * row_, row_, weights_.data() + band.weights, 2 * reach_ + 1, band.groups,
                          band.taps, end - begin});
    }
  }
}

}  // namespace fastinv
