#include "correlation.h"

#include <algorithm>
#include <tuple>

#include "cost.h"

namespace fastinv {

Correlation::Correlation(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias)
    : kernels_(kernels), geometry_(geometry), form_(choose_form()), tile_pixels_(kMaxTilePixels) {
  const int out = geometry.out_channels / geometry.groups;
  if (form_ == Form::kDot) tile_pixels_ = kernels.dot_pixels[std::min(out, kMaxDotOutputs)];
  if (form_ == Form::kBroadcast && out <= kernels.width) tile_pixels_ = kMaxNarrowPixels;
  order_taps();
  build_rows();
  pack(weight, bias);
  shared_tiles_.clear();
  measure_rows();
  zeros_ = Buffer(longest_run_);
}

Correlation::Form Correlation::choose_form() const {
  return dot_cost(kernels_, geometry_) < broadcast_cost(kernels_, geometry_) ? Form::kDot : Form::kBroadcast;
}

void Correlation::order_taps() {
  const Geometry& g = geometry_;
  const int phases_y = g.phases(0), phases_x = g.phases(1);
  int32_t row = 0;
  for (int py = 0; py < phases_y; ++py) {
    for (int px = 0; px < phases_x; ++px) {
      std::vector<Tap>& taps = phases_.emplace_back();
      for (int y : g.phase_taps(0, py)) {
        for (int x : g.phase_taps(1, px)) {
          taps.push_back({y, x, row});
          row += g.in_channels / g.groups;
        }
      }
    }
  }
  weight_rows_ = row;
}

void Correlation::build_rows() {
  const Geometry& g = geometry_;
  const int step_y = g.phases(0), step_x = g.phases(1);
  for (int py = 0; py < step_y; ++py) {
    for (int px = 0; px < step_x; ++px) {
      const int phase = py * step_x + px;
      const int columns = ceil_div(g.axis[1].out - px, step_x);
      // Rows of fewer than 4 pixels leave most of a tile empty: there tiles run on from row to row.
      const bool narrow = columns < 4;
      by_row_ = by_row_ && !narrow;
      std::vector<Pixel> pixels;
      for (int y = py; y < g.axis[0].out; y += step_y) {
        for (int x = px; x < g.axis[1].out; x += step_x) pixels.push_back({y, x});
        if (!narrow) {
          add_row(phase, pixels, true);
          pixels.clear();
        }
      }
      if (!pixels.empty()) add_row(phase, pixels, false);
    }
  }
}

// Appends the tiles of these pixels. Rows of the same phase whose taps fall inside the same way differ only in where
// they start, and share their tiles.
void Correlation::add_row(int phase, const std::vector<Pixel>& pixels, bool shared) {
  const Geometry& g = geometry_;
  std::vector<Tap> taps;
  std::vector<int> key = {phase};
  int first_y = 0;
  for (const Tap& tap : phases_[static_cast<size_t>(phase)]) {
    if (shared) {
      int y;
      g.source(0, pixels[0].y, tap.y, &y);
      if (!g.inside(0, y)) continue;
      if (taps.empty()) first_y = y;
      key.push_back(tap.y);
    }
    taps.push_back(tap);
  }
  TileRow row = {};
  row.in_base = int64_t{first_y} * g.axis[1].in * g.in_channels;
  row.out_base = shared ? int64_t{pixels[0].y} * g.axis[1].out * g.out_channels : 0;
  const auto known = shared ? shared_tiles_.find(key) : shared_tiles_.end();
  if (known != shared_tiles_.end()) {
    std::tie(row.first_tile, row.tiles) = known->second;
  } else {
    row.first_tile = static_cast<int32_t>(tiles_.size());
    add_tiles(taps, pixels, first_y, row.out_base);
    row.tiles = static_cast<int32_t>(tiles_.size()) - row.first_tile;
    if (shared) shared_tiles_[key] = {row.first_tile, row.tiles};
  }
  rows_.push_back(row);
}

void Correlation::add_tiles(const std::vector<Tap>& taps, const std::vector<Pixel>& pixels, int first_y,
                            int64_t out_base) {
  const Geometry& g = geometry_;
  const int total = static_cast<int>(pixels.size());
  const int count = ceil_div(total, tile_pixels_);
  for (int t = 0, begin = 0; t < count; ++t) {
    const int size = total / count + (t < total % count ? 1 : 0);  // even: 32 is 6+6+5+5+5+5, not 6·5+2
    Tile tile = {};
    tile.pixels = size;
    for (int p = 0; p < size; ++p) {
      const Pixel& pixel = pixels[static_cast<size_t>(begin + p)];
      tile.out[p] = static_cast<int32_t>((int64_t{pixel.y} * g.axis[1].out + pixel.x) * g.out_channels - out_base);
    }
    tile.first_run = static_cast<int32_t>(runs_.size());
    add_runs(taps, &pixels[static_cast<size_t>(begin)], size, first_y);
    tile.runs = static_cast<int32_t>(runs_.size()) - tile.first_run;
    tiles_.push_back(tile);
    begin += size;
  }
}

void Correlation::add_runs(const std::vector<Tap>& taps, const Pixel* pixels, int count, int first_y) {
  const Geometry& g = geometry_;
  const size_t first_run = runs_.size();
  for (const Tap& tap : taps) {
    Run run = {};
    run.weight = tap.row;
    run.length = g.in_channels / g.groups;
    bool inside = false;
    for (int p = 0; p < count; ++p) {
      int y, x;
      g.source(0, pixels[p].y, tap.y, &y);
      g.source(1, pixels[p].x, tap.x, &x);
      const bool outside = !g.inside(0, y) || !g.inside(1, x);
      inside |= !outside;
      run.offset[p] =
          outside ? kOutside : static_cast<int32_t>((int64_t{y - first_y} * g.axis[1].in + x) * g.in_channels);
    }
    if (!inside) continue;
    // Taps side by side read one contiguous stretch; one long run costs less than several short ones.
    bool joins = runs_.size() > first_run && runs_.back().weight + runs_.back().length == run.weight;
    for (int p = 0; joins && p < count; ++p) {
      const int32_t before = runs_.back().offset[p];
      joins = before == kOutside ? run.offset[p] == kOutside : run.offset[p] == before + runs_.back().length;
    }
    if (joins) {
      runs_.back().length += run.length;
    } else {
      runs_.push_back(run);
    }
    longest_run_ = std::max(longest_run_, runs_.back().length);
  }
}

void Correlation::measure_rows() {
  work_.push_back(0);
  for (const TileRow& row : rows_) {
    int64_t products = 1;  // no row is empty
    for (int32_t t = row.first_tile; t < row.first_tile + row.tiles; ++t) {
      const Tile& tile = tiles_[static_cast<size_t>(t)];
      for (int32_t r = tile.first_run; r < tile.first_run + tile.runs; ++r) {
        products += int64_t{runs_[static_cast<size_t>(r)].length} * tile.pixels;
      }
    }
    work_.push_back(work_.back() + products);
  }
}

void Correlation::pack(const WeightAt& weight, const float* bias) {
  const Geometry& g = geometry_;
  const int in = g.in_channels / g.groups, out = g.out_channels / g.groups;
  const bool broadcast = form_ == Form::kBroadcast;
  const int padded = broadcast ? static_cast<int>(round_up(out, kernels_.width)) : out;
  const int block = broadcast ? kernels_.max_vectors * kernels_.width : 1;
  group_weights_ = weight_rows_ * padded;
  group_bias_ = padded;
  weights_ = Buffer(group_weights_ * g.groups);
  if (bias) bias_ = Buffer(group_bias_ * g.groups);
  for (int group = 0; group < g.groups; ++group) {
    if (bias) std::copy_n(bias + group * out, out, bias_.data() + group * group_bias_);
    for (const std::vector<Tap>& taps : phases_) {
      for (const Tap& tap : taps) {
        for (int o = 0; o < out; ++o) {
          const int first = o / block * block;               // channels in the blocks before
          const int span = std::min(block, padded - first);  // channels in this block
          for (int i = 0; i < in; ++i) {
            const int64_t row = tap.row + i;
            const int64_t at = group * group_weights_ + first * weight_rows_ + row * span + (o - first);
            weights_[at] = weight(group, o, i, tap.y, tap.x);
          }
        }
      }
    }
  }
}

void Correlation::run(const Operands& x, Share share, float*) const {
  // Rows of a transposed convolution's phases have different numbers of taps: shares are cut by products.
  const int64_t work = work_.back(), end = share.end(x.images * work);
  for (int64_t at = share.begin(x.images * work); at < end;) {
    const int64_t image = at / work, until = std::min(end, (image + 1) * work);
    const int64_t first = first_row(at - image * work), last = first_row(until - image * work);
    run_tiles(x, image, first, last - first);
    at = until;
  }
}

void Correlation::run_rows(const Operands& x, int first_row, int last_row, float*) const {
  const int step_y = geometry_.phases(0), step_x = geometry_.phases(1);
  int64_t at = 0;  // where the rows of the phase begin
  for (int phase = 0; phase < step_y * step_x; ++phase) {
    const auto before = [&](int row) { return ceil_div(std::max(0, row - phase / step_x), step_y); };
    run_tiles(x, 0, at + before(first_row), before(last_row) - before(first_row));
    at += before(geometry_.axis[0].out);
  }
}

// The first row that begins at or after so many products.
int64_t Correlation::first_row(int64_t products) const {
  return std::lower_bound(work_.begin(), work_.end(), products) - work_.begin();
}

void Correlation::run_tiles(const Operands& x, int64_t image, int64_t first, int64_t count) const {
  const Geometry& g = geometry_;
  const float* in = x.in + image * x.in_stride;
  const float* addend = x.addend ? x.addend + image * x.addend_stride : nullptr;
  float* out = x.out + image * x.out_stride;
  const TileRow* rows = rows_.data() + first;
  const bool dot = form_ == Form::kDot;
  const auto kernel = x.lanes > 1 ? (dot ? kernels_.correlate_abreast_dot : kernels_.correlate_abreast)
                                  : (dot ? kernels_.correlate_dot : kernels_.correlate);
  const int in_step = g.in_channels / g.groups, out_step = g.out_channels / g.groups;
  for (int group = 0; group < g.groups; ++group) {
    const float* bias = bias_.data() ? bias_.data() + group * group_bias_ : nullptr;
    kernel({in + group * in_step * x.lanes, out + group * out_step * x.lanes, zeros_.data(), rows, count, tiles_.data(),
            runs_.data(), weights_.data() + group * group_weights_, weight_rows_, bias, out_step,
            addend ? addend + group * out_step : nullptr, x.activation});
  }
}

std::string Correlation::algorithm() const {
  const int width = kernels_.width;
  const int out = geometry_.out_channels / geometry_.groups;
  if (form_ == Form::kDot) {
    return "dot " + std::to_string(tile_pixels_) + "x" + std::to_string(std::min(out, kMaxDotOutputs));
  }
  const int vectors = std::min(kernels_.max_vectors, ceil_div(out, width));
  return "broadcast " + std::to_string(tile_pixels_) + "x" + std::to_string(vectors * width);
}

}  // namespace fastinv
