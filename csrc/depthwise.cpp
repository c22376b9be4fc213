#include "depthwise.h"

#include <algorithm>
#include <iterator>

#include "cost.h"

namespace fastinv {

namespace {

int pixel_distance(const Geometry& g) { return g.transposed ? 1 : g.axis[1].stride; }

}  // namespace

bool Depthwise::applies(const Geometry& g) {
  return g.groups > 1 && g.groups == g.in_channels && g.groups == g.out_channels;
}

Depthwise::Depthwise(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias)
    : kernels_(kernels),
      geometry_(geometry),
      unit_(pixel_distance(geometry) <= 2 ? 1 : pixel_distance(geometry)),
      pixel_step_(pixel_distance(geometry) / unit_) {
  plan_rows();
  plan_columns();
  pack(weight, bias);
}

void Depthwise::plan_rows() {
  const Geometry& g = geometry_;
  const int64_t in_row = int64_t{g.axis[1].in} * g.in_channels, taps = int64_t{g.axis[1].kernel} * g.in_channels;
  for (int y = 0; y < g.axis[0].out; ++y) {
    for (int tap : g.phase_taps(0, y % g.phases(0))) {
      int position;
      g.source(0, y, tap, &position);
      if (g.inside(0, position)) tap_rows_.push_back({position * in_row, tap * taps});
    }
    first_tap_row_.push_back(tap_rows_.size());
  }
}

void Depthwise::plan_columns() {
  const int phases = geometry_.phases(1);
  for (int phase = 0; phase < phases; ++phase) {
    const std::vector<int> taps = geometry_.phase_taps(1, phase);
    add_tiles(phase, taps, static_cast<int>(columns_.size()));
    columns_.insert(columns_.end(), taps.begin(), taps.end());
  }
}

// Tiles of about the same size: 32 is 6+6+5+5+5+5, not 6·5+2. The taps' weights are packed from `slot` on.
void Depthwise::add_tiles(int phase, const std::vector<int>& taps, int slot) {
  const Geometry& g = geometry_;
  const int step = g.phases(1), total = ceil_div(g.axis[1].out - phase, step), count = ceil_div(total, kMaxTilePixels);
  for (int t = 0; t < count; ++t) {
    const int begin = total * t / count, end = total * (t + 1) / count, x = phase + begin * step;
    const auto first_run = static_cast<int32_t>(runs_.size());
    add_runs(x, end - begin, taps, slot);
    tiles_.push_back({x * g.out_channels, end - begin, first_run, static_cast<int32_t>(runs_.size()) - first_run});
  }
}

// Runs for so many pixels from column x of the results on.
void Depthwise::add_runs(int x, int pixels, const std::vector<int>& taps, int slot) {
  const Geometry& g = geometry_;
  const auto position = [&](size_t tap) {
    int column;
    g.source(1, x, taps[tap], &column);
    return column;
  };
  for (size_t tap = 0; tap < taps.size();) {
    const int start = position(tap);
    int adjacent = 1;
    while (unit_ == 1 && tap + adjacent < taps.size() && position(tap + adjacent) == start + adjacent) ++adjacent;
    const int most = *std::find_if(std::begin(kDepthwiseTaps), std::end(kDepthwiseTaps),
                                   [&](int taps_of_run) { return taps_of_run <= adjacent; });
    DepthwiseRun run = {start * g.in_channels, 0, most, (slot + static_cast<int>(tap)) * g.in_channels};
    for (int j = 0; j < (pixels - 1) * pixel_step_ + most; ++j) {
      if (g.inside(1, start + j * unit_)) run.there |= 1u << j;
    }
    if (run.there) runs_.push_back(run);
    tap += static_cast<size_t>(most);
  }
}

void Depthwise::pack(const WeightAt& weight, const float* bias) {
  const int channels = geometry_.in_channels;
  weights_ = Buffer(int64_t{geometry_.axis[0].kernel} * geometry_.axis[1].kernel * channels);
  int64_t at = 0;
  for (int y = 0; y < geometry_.axis[0].kernel; ++y) {
    for (int x : columns_) {
      for (int c = 0; c < channels; ++c) weights_[at++] = weight(c, 0, 0, y, x);
    }
    at = int64_t{y + 1} * geometry_.axis[1].kernel * channels;  // taps that no column reads have no place
  }
  if (!bias) return;
  bias_ = Buffer(channels);
  std::copy_n(bias, channels, bias_.data());
}

void Depthwise::run(const Operands& x, Share share, float* scratch) const {
  const int64_t rows = geometry_.axis[0].out, end = share.end(x.images * rows);
  for (int64_t at = share.begin(x.images * rows); at < end;) {
    const int64_t image = at / rows, until = std::min(end, (image + 1) * rows);
    Operands of_image = x;
    of_image.in += image * x.in_stride;
    of_image.out += image * x.out_stride;
    if (x.addend) of_image.addend += image * x.addend_stride;
    run_rows(of_image, static_cast<int>(at - image * rows), static_cast<int>(until - image * rows), scratch);
    at = until;
  }
}

void Depthwise::run_rows(const Operands& x, int first_row, int last_row, float*) const {
  const Geometry& g = geometry_;
  const int64_t out_row = int64_t{g.axis[1].out} * g.out_channels;
  for (int row = first_row; row < last_row; ++row) {
    const size_t first = first_tap_row_[static_cast<size_t>(row)], last = first_tap_row_[static_cast<size_t>(row) + 1];
    kernels_.depthwise({x.in, x.out + row * out_row, tap_rows_.data() + first, static_cast<int32_t>(last - first),
                        tiles_.data(), static_cast<int32_t>(tiles_.size()), runs_.data(), pixel_step_,
                        int64_t{unit_} * g.in_channels, int64_t{g.phases(1)} * g.out_channels, weights_.data(),
                        bias_.data(), g.in_channels, out_row, x.addend ? x.addend + row * out_row : nullptr,
                        x.activation});
  }
}

std::string Depthwise::algorithm() const {
  return "depthwise " + std::to_string(kMaxTilePixels) + "x" + std::to_string(kernels_.width);
}

}  // namespace fastinv
