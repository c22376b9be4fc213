#include "planar.h"

#include <algorithm>
#include <climits>

#include "cost.h"

namespace fastinv {
namespace {

int stride_of(const Axis& axis, bool transposed) { return transposed ? axis.stride : 1; }

// The taps of one phase of an axis, as a window over the input: output i of the phase reads position
// i + shift + t through tap[t].
struct Window {
  int shift = 0;
  std::vector<int> tap;
};

Window window(const Axis& axis, bool transposed, int phase) {
  Window w;
  if (!transposed) {
    w.shift = -axis.padding;
    for (int k = 0; k < axis.kernel; ++k) w.tap.push_back(k);
    return w;
  }
  for (int k = axis.kernel - 1; k >= 0; --k) {  // increasing input positions
    const int scaled = phase + axis.padding - k;
    if (scaled % axis.stride != 0) continue;
    if (w.tap.empty()) w.shift = scaled / axis.stride;
    w.tap.push_back(k);
  }
  return w;
}

}  // namespace

bool Planar::applies(const Geometry& g) {
  const auto fits = [&g](const Axis& a) { return a.dilation == 1 && (g.transposed || a.stride == 1); };
  const Axis &y = g.axis[0], &x = g.axis[1];
  return fits(y) && fits(x) && ceil_div(y.kernel, stride_of(y, g.transposed)) <= kMaxPlanarTaps &&
         x.kernel < kMaxPlanarTaps && stride_of(x, g.transposed) <= 2;
}

Planar::Planar(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias)
    : kernels_(kernels),
      geometry_(geometry),
      block_(planar_block(geometry)),
      tile_rows_(kernels.planar_rows[block_ * stride_of(geometry.axis[1], geometry.transposed)]) {
  const int step_y = stride_of(geometry.axis[0], geometry.transposed),
            step_x = stride_of(geometry.axis[1], geometry.transposed);
  bias_ = Buffer(int64_t{geometry.out_channels} * step_x);
  if (bias) {
    for (int o = 0; o < geometry.out_channels * step_x; ++o)
      bias_[o] = bias[o / step_x] + 0.0f;  // no −0: adding products that are 0 would change it
  }
  for (int row = 0; row < std::min(step_y, geometry.axis[0].out); ++row) plan_phase(row, weight);
  units_ = cut(0, geometry.axis[0].out);
}

// Tiles of about the same size for these rows of the image.
std::vector<Planar::Unit> Planar::cut(int first_row, int last_row) const {
  const int step = static_cast<int>(phases_.size());
  std::vector<Unit> units;
  for (int phase = 0; phase < step; ++phase) {
    const auto before = [&](int row) { return ceil_div(std::max(0, row - phase), step); };
    const int first = before(first_row), rows = before(last_row) - first, tiles = ceil_div(rows, tile_rows_);
    for (int t = 0; t < tiles; ++t) {
      const int begin = rows * t / tiles;
      units.push_back({phase, first + begin, rows * (t + 1) / tiles - begin});
    }
  }
  return units;
}

void Planar::plan_phase(int row, const WeightAt& weight) {
  const Geometry& g = geometry_;
  const int in = g.in_channels / g.groups, out = g.out_channels / g.groups;
  const int step_x = stride_of(g.axis[1], g.transposed);
  const Window y = window(g.axis[0], g.transposed, row);
  Window x[2];  // of the even and the odd columns; their union is what a vector of both reads
  Phase phase = {};
  int end = INT_MIN;  // some column has a tap; where all lie in the padding, this is negative
  phase.shift_x = INT_MAX;
  for (int p = 0; p < step_x; ++p) {
    x[p] = window(g.axis[1], g.transposed, p);
    if (x[p].tap.empty()) continue;
    phase.shift_x = std::min(phase.shift_x, x[p].shift);
    end = std::max(end, x[p].shift + static_cast<int>(x[p].tap.size()));
  }
  phase.row = row;
  phase.shift_y = y.shift;
  phase.taps = planar_taps(block_ * step_x, static_cast<int>(y.tap.size()));
  phase.taps_y = static_cast<int>(round_up(static_cast<int64_t>(y.tap.size()), phase.taps));
  phase.taps_x = end - phase.shift_x;
  phase.group_weights = int64_t{in} * out * step_x * phase.taps_y * phase.taps_x;
  phase.weights = Buffer(phase.group_weights * g.groups);
  int64_t at = 0;
  for (int group = 0; group < g.groups; ++group) {
    for (int first = 0; first < out; first += block_) {
      const int channels = std::min(block_, out - first);
      for (int i = 0; i < in; ++i) {
        for (int t = 0; t < phase.taps_y; t += phase.taps) {
          for (int k = 0; k < phase.taps_x; ++k) {
            for (int u = t; u < t + phase.taps; ++u) {
              for (int o = 0; o < channels * step_x; ++o, ++at) {
                const Window& columns = x[o % step_x];
                const int v = k + phase.shift_x - columns.shift;
                const bool inside =
                    u < static_cast<int>(y.tap.size()) && v >= 0 && v < static_cast<int>(columns.tap.size());
                if (!inside) continue;
                phase.weights[at] = weight(group, first + o / step_x, i, y.tap[static_cast<size_t>(u)],
                                           columns.tap[static_cast<size_t>(v)]);
              }
            }
          }
        }
      }
    }
  }
  phases_.push_back(std::move(phase));
}

void Planar::run(const Operands& x, Share share, float*) const {
  const Geometry& g = geometry_;
  const int step_x = stride_of(g.axis[1], g.transposed);
  const int64_t units = static_cast<int64_t>(units_.size());
  // Each unit fetches its part of the next image, spread over the channels of its tiles.
  const int64_t part = int64_t{g.in_channels} * g.axis[0].in * g.axis[1].in / units;
  const int64_t calls = int64_t{ceil_div(ceil_div(g.axis[1].out, step_x), kernels_.width)} *
                        ceil_div(g.out_channels / g.groups, block_) * g.in_channels;
  const int step = static_cast<int>(round_up((part + calls - 1) / calls, kLineFloats));
  for (int64_t u = share.begin(x.images * units); u < share.end(x.images * units); ++u) {
    const int64_t image = u / units;
    const bool more = image + 1 < x.images + x.ahead;
    const float* next = more ? x.in + (image + 1) * x.in_stride + u % units * part : nullptr;
    run_unit(units_[static_cast<size_t>(u % units)], x, image, next, more ? step : 0);
  }
}

void Planar::run_rows(const Operands& x, int first_row, int last_row, float*) const {
  for (const Unit& unit : cut(first_row, last_row)) run_unit(unit, x, 0, nullptr, 0);
}

void Planar::run_unit(const Unit& unit, const Operands& x, int64_t image, const float* next, int next_step) const {
  const Geometry& g = geometry_;
  const int in = g.in_channels / g.groups, out = g.out_channels / g.groups;
  const int step_y = stride_of(g.axis[0], g.transposed), step_x = stride_of(g.axis[1], g.transposed);
  const int64_t in_group = in * int64_t{g.axis[0].in} * g.axis[1].in * x.lanes;
  const int64_t out_group = out * int64_t{g.axis[0].out} * g.axis[1].out * x.lanes;
  const Phase& phase = phases_[static_cast<size_t>(unit.phase)];
  for (int group = 0; group < g.groups; ++group) {
    kernels_.planar({x.in + image * x.in_stride + group * in_group,
                     x.out + image * x.out_stride + group * out_group,
                     x.addend ? x.addend + image * x.addend_stride + group * out_group : nullptr,
                     phase.weights.data() + group * phase.group_weights,
                     bias_.data() + int64_t{group} * out * step_x,
                     in,
                     g.axis[0].in,
                     g.axis[1].in,
                     out,
                     g.axis[0].out,
                     g.axis[1].out,
                     phase.taps_y,
                     phase.taps_x,
                     phase.shift_y,
                     phase.shift_x,
                     step_y,
                     step_x,
                     phase.row,
                     block_,
                     phase.taps,
                     unit.first_row,
                     unit.rows,
                     next,
                     next_step,
                     x.lanes > 1,
                     x.activation});
    if (next)
      next +=
          int64_t{next_step} * in * ceil_div(out, block_) * ceil_div(ceil_div(g.axis[1].out, step_x), kernels_.width);
  }
}

std::string Planar::algorithm() const {
  const int outputs = block_ * stride_of(geometry_.axis[1], geometry_.transposed);
  return "planar " + std::to_string(kernels_.planar_rows[outputs]) + "x" + std::to_string(outputs);
}

}  // namespace fastinv
