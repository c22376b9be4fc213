#include "winograd.h"

#include <algorithm>

#include "cost.h"

namespace fastinv {
namespace {

constexpr int kIn = kWinogradPoints, kPositions = kIn * kIn;
// Transformed inputs and products of a chunk of tiles should stay in L2 (1 MiB on Zen 4) beside the weights of one
// position; with fewer tiles the weights would be read more often from farther away.
constexpr int64_t kChunkFloats = 448 * 1024 / sizeof(float);
constexpr int64_t kMaxChunk = 32;  // in tiles of the product's rows; more would not make weights cheaper

}  // namespace

double winograd_g(int taps, int point, int tap) {
  constexpr double kPoint[] = {0, 1, -1, 2, -2}, kScale[] = {1.0 / 4, -1.0 / 6, -1.0 / 6, 1.0 / 24, 1.0 / 24};
  if (point == kIn - 1) return tap == taps - 1 ? 1.0 : 0.0;  // ∞
  double power = kScale[point];
  for (int i = 0; i < tap; ++i) power *= kPoint[point];
  return power;
}

bool Winograd::applies(const Geometry& g) {
  const auto fits = [&g](const Axis& a) { return a.kernel == g.axis[0].kernel && a.stride == 1 && a.dilation == 1; };
  return g.groups == 1 && (g.axis[0].kernel == 3 || g.axis[0].kernel == 5) && fits(g.axis[0]) && fits(g.axis[1]);
}

bool Winograd::shrinks(const Geometry& g) {
  const auto tiles = [&g](int Axis::* side) {
    const int outputs = winograd_outputs(g.axis[0].kernel);
    return int64_t{ceil_div(g.axis[0].*side, outputs)} * ceil_div(g.axis[1].*side, outputs);
  };
  return tiles(&Axis::in) < tiles(&Axis::out);
}

Winograd::Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, bool adjoint)
    : kernels_(kernels),
      geometry_(geometry),
      adjoint_(adjoint),
      taps_(geometry.axis[0].kernel),
      outputs_(winograd_outputs(taps_)),
      tiles_y_(ceil_div(adjoint ? geometry.axis[0].in : geometry.axis[0].out, outputs_)),
      tiles_x_(ceil_div(adjoint ? geometry.axis[1].in : geometry.axis[1].out, outputs_)),
      product_(kernels, geometry.in_channels, geometry.out_channels, kPositions, false),
      bias_(round_up(geometry.out_channels, kernels.width)),
      zeros_(geometry.in_channels * kernels.width) {
  for (int axis = 0; axis < 2; ++axis) {
    const int padding = geometry.axis[axis].padding;
    padding_[axis] = geometry.transposed != adjoint ? taps_ - 1 - padding : padding;
  }
  single_ = plan(1);
  abreast_ = plan(kernels.width);
  pack(weight);
}

Winograd::Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias)
    : Winograd(kernels, geometry, weight, false) {
  if (bias) std::copy_n(bias, geometry.out_channels, bias_.data());
}

Winograd::Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight)
    : Winograd(kernels, geometry, weight, true) {}

Winograd::Chunk Winograd::plan(int64_t lanes) const {
  const int64_t in = lanes * geometry_.in_channels, out = lanes * geometry_.out_channels;
  const int64_t fitting = kChunkFloats / (kPositions * (in + out));
  const auto tiles = std::clamp<int64_t>(fitting / kMaxTilePixels, 1, kMaxChunk) * kMaxTilePixels;
  // One line more between positions: strides that are powers of two would put all 36 into the same cache sets.
  return {static_cast<int>(tiles), round_up(tiles * in, kLineFloats) + kLineFloats,
          round_up(tiles * out, kLineFloats) + kLineFloats};
}

int64_t Winograd::scratch_floats(int64_t lanes) const {
  return kPositions * (chunk(lanes).in_stride + chunk(lanes).out_stride);
}

std::string Winograd::algorithm() const {
  const std::string tile = std::to_string(outputs_);
  return (adjoint_ ? "winograd adjoint " : "winograd ") + tile + "x" + tile + ", chunk " +
         std::to_string(single_.tiles);
}

void Winograd::pack(const WeightAt& weight) {
  const Geometry& g = geometry_;
  const int in = g.in_channels, out = g.out_channels;
  // A transposed convolution of stride 1 is a plain one with its taps turned round.
  const bool turned = g.transposed != adjoint_;
  for (int o = 0; o < out; ++o) {
    for (int i = 0; i < in; ++i) {
      double rows[kIn][kIn];  // G·g
      for (int u = 0; u < kIn; ++u) {
        for (int x = 0; x < taps_; ++x) {
          rows[u][x] = 0.0;
          for (int y = 0; y < taps_; ++y) {
            const double w = turned ? weight(0, o, i, taps_ - 1 - y, taps_ - 1 - x) : weight(0, o, i, y, x);
            rows[u][x] += winograd_g(taps_, u, y) * w;
          }
        }
      }
      for (int u = 0; u < kIn; ++u) {
        for (int v = 0; v < kIn; ++v) {
          double sum = 0.0;
          for (int x = 0; x < taps_; ++x) sum += rows[u][x] * winograd_g(taps_, v, x);
          product_.set(u * kIn + v, i, o, sum);
        }
      }
    }
  }
}

Winograd::Tile Winograd::tile(int64_t number) const {
  const int64_t image = number / (tiles_y_ * tiles_x_);
  const auto inside = static_cast<int>(number % (tiles_y_ * tiles_x_));
  return {image, inside / tiles_x_ * outputs_, inside % tiles_x_ * outputs_};
}

void Winograd::transform_inputs(const Operands& operands, const Chunk& chunk, int64_t first, int count,
                                float* transformed) const {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const int channels = geometry_.in_channels * static_cast<int>(operands.lanes);
  const int side = adjoint_ ? outputs_ : kIn;  // of the tile that is read
  for (int t = 0; t < count; ++t) {
    const Tile tile = this->tile(first + t);
    const float* in = operands.in + tile.image * operands.in_stride;
    const int y0 = tile.y - (adjoint_ ? 0 : padding_[0]), x0 = tile.x - (adjoint_ ? 0 : padding_[1]);
    const float* pixels[kPositions];
    for (int u = 0; u < side; ++u) {
      for (int v = 0; v < side; ++v) {
        const int y = y0 + u, x = x0 + v;
        const bool inside = y >= 0 && y < rows.in && x >= 0 && x < columns.in;
        pixels[u * side + v] = inside ? in + (int64_t{y} * columns.in + x) * channels : zeros_.data();
      }
    }
    float* to = transformed + int64_t{t} * channels;
    if (adjoint_) {
      kernels_.winograd_adjoint_input(pixels, outputs_, channels, to, chunk.in_stride);
    } else {
      kernels_.winograd_input(pixels, channels, to, chunk.in_stride);
    }
  }
}

void Winograd::add_outputs(const Operands& operands, const Chunk& chunk, const float* products, int64_t first,
                           int count, RowRange own) const {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const int channels = geometry_.out_channels * static_cast<int>(operands.lanes);
  for (int t = 0; t < count; ++t) {
    const Tile tile = this->tile(first + t);
    const int y = tile.y - padding_[0], x = tile.x - padding_[1];
    const int64_t row = tile.image * rows.out;  // of the image's first
    const auto begin = static_cast<int>(std::max<int64_t>(0, own.begin - row));
    const auto end = static_cast<int>(std::min<int64_t>(rows.out, own.end - row));
    kernels_.winograd_adjoint_output(
        {products + int64_t{t} * channels, chunk.out_stride,
         operands.out + tile.image * operands.out_stride + (int64_t{y} * columns.out + x) * channels,
         int64_t{columns.out} * channels, channels, std::max(0, begin - y), std::min(kIn, end - y), std::max(0, -x),
         std::min(kIn, columns.out - x)});
  }
}

void Winograd::transform_outputs(const Operands& operands, const Chunk& chunk, const float* products, int64_t first,
                                 int count) const {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const int channels = geometry_.out_channels * static_cast<int>(operands.lanes);
  for (int t = 0; t < count; ++t) {
    const Tile tile = this->tile(first + t);
    const int64_t at = (int64_t{tile.y} * columns.out + tile.x) * channels;
    kernels_.winograd_output({products + int64_t{t} * channels, chunk.out_stride, bias_.data(), operands.lanes > 1,
                              operands.out + tile.image * operands.out_stride + at,
                              operands.addend ? operands.addend + tile.image * operands.addend_stride + at : nullptr,
                              int64_t{columns.out} * channels, channels, outputs_,
                              std::min(outputs_, rows.out - tile.y), std::min(outputs_, columns.out - tile.x),
                              operands.activation});
  }
}

void Winograd::run_tiles(const Operands& operands, int64_t first, int64_t last, float* scratch, RowRange rows) const {
  const Chunk& chunk = this->chunk(operands.lanes);
  float* products = scratch + kPositions * chunk.in_stride;
  for (; first < last; first += chunk.tiles) {
    const int count = static_cast<int>(std::min<int64_t>(chunk.tiles, last - first));
    transform_inputs(operands, chunk, first, count, scratch);
    product_.run(kPositions, count, scratch, chunk.in_stride, products, chunk.out_stride, nullptr, operands.lanes > 1);
    if (adjoint_) {
      add_outputs(operands, chunk, products, first, count, rows);
    } else {
      transform_outputs(operands, chunk, products, first, count);
    }
  }
}

// What tiles of the adjoint form add to.
void Winograd::clear(const Operands& x, RowRange rows) const {
  const int64_t row = geometry_.axis[1].out * geometry_.out_channels * x.lanes, height = geometry_.axis[0].out;
  for (int64_t at = rows.begin, end; at < rows.end; at = end) {
    const int64_t image = at / height, first = at % height;
    end = std::min(rows.end, (image + 1) * height);
    float* out = x.out + image * x.out_stride + first * row;
    if (!x.addend) {
      std::fill_n(out, (end - at) * row, 0.0f);
    } else if (x.addend != x.out) {
      std::copy_n(x.addend + image * x.addend_stride + first * row, (end - at) * row, out);
    }
  }
}

// Tiles that reach over the border of two workers' rows are computed by both.
void Winograd::run_adjoint(const Operands& operands, RowRange rows, float* scratch) const {
  if (rows.begin == rows.end) return;
  clear(operands, rows);
  const int height = geometry_.axis[0].out;
  const auto tile_row = [&](int64_t row, int reach) {  // the first that begins `reach` rows above this one, or lower
    const auto at = static_cast<int>(row % height) + padding_[0] - reach;
    return row / height * tiles_y_ + std::clamp(at < 0 ? 0 : ceil_div(at, outputs_), 0, tiles_y_);
  };
  const int64_t first = tile_row(rows.begin, kIn - 1), last = tile_row(rows.end - 1, -1);
  run_tiles(operands, first * tiles_x_, last * tiles_x_, scratch, rows);
}

void Winograd::run(const Operands& operands, Share share, float* scratch) const {
  const int64_t units = operands.images * (adjoint_ ? geometry_.axis[0].out : int64_t{tiles_y_} * tiles_x_);
  const int64_t begin = share.begin(units), end = share.end(units);
  adjoint_ ? run_adjoint(operands, {begin, end}, scratch) : run_tiles(operands, begin, end, scratch);
}

// As many tiles as go through all three stages together, or most of them.
int Winograd::row_step() const { return adjoint_ ? 0 : outputs_ * std::max(1, single_.tiles / tiles_x_); }

void Winograd::run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const {
  run_tiles(operands, int64_t{first_row / outputs_} * tiles_x_, int64_t{ceil_div(last_row, outputs_)} * tiles_x_,
            scratch);
}

}  // namespace fastinv
