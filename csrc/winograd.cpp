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

Winograd::Winograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight, const float* bias)
    : kernels_(kernels),
      geometry_(geometry),
      taps_(geometry.axis[0].kernel),
      outputs_(winograd_outputs(taps_)),
      tiles_y_(ceil_div(geometry.axis[0].out, outputs_)),
      tiles_x_(ceil_div(geometry.axis[1].out, outputs_)),
      product_(kernels, geometry.in_channels, geometry.out_channels, kPositions, false),
      zeros_(geometry.in_channels) {
  for (int axis = 0; axis < 2; ++axis) {
    const int padding = geometry.axis[axis].padding;
    padding_[axis] = geometry.transposed ? taps_ - 1 - padding : padding;
  }
  const int64_t fitting = kChunkFloats / (kPositions * int64_t{geometry.in_channels + geometry.out_channels});
  chunk_ = static_cast<int>(std::clamp<int64_t>(fitting / kMaxTilePixels, 1, kMaxChunk)) * kMaxTilePixels;
  // One line more between positions: strides that are powers of two would put all 36 into the same cache sets.
  in_stride_ = round_up(int64_t{chunk_} * geometry.in_channels, kLineFloats) + kLineFloats;
  out_stride_ = round_up(int64_t{chunk_} * geometry.out_channels, kLineFloats) + kLineFloats;
  pack(weight, bias);
}

int64_t Winograd::scratch_floats() const { return kPositions * (in_stride_ + out_stride_); }

std::string Winograd::algorithm() const {
  const std::string tile = std::to_string(outputs_);
  return "winograd " + tile + "x" + tile + ", chunk " + std::to_string(chunk_);
}

void Winograd::pack(const WeightAt& weight, const float* bias) {
  const Geometry& g = geometry_;
  const int in = g.in_channels, out = g.out_channels;
  bias_ = Buffer(round_up(out, kernels_.width));
  if (bias) std::copy_n(bias, out, bias_.data());
  for (int o = 0; o < out; ++o) {
    for (int i = 0; i < in; ++i) {
      double rows[kIn][kIn];  // G·g
      for (int u = 0; u < kIn; ++u) {
        for (int x = 0; x < taps_; ++x) {
          rows[u][x] = 0.0;
          for (int y = 0; y < taps_; ++y) {
            // A transposed convolution of stride 1 is a plain one with its taps turned round.
            const double w = g.transposed ? weight(0, o, i, taps_ - 1 - y, taps_ - 1 - x) : weight(0, o, i, y, x);
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

void Winograd::transform_inputs(const Operands& operands, int64_t first, int count, float* transformed) const {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const int channels = geometry_.in_channels, total = tiles_y_ * tiles_x_;
  for (int t = 0; t < count; ++t) {
    const int64_t image = (first + t) / total;
    const int tile = static_cast<int>((first + t) % total);
    const float* in = operands.in + image * operands.in_stride;
    const int y0 = tile / tiles_x_ * outputs_ - padding_[0], x0 = tile % tiles_x_ * outputs_ - padding_[1];
    const float* pixels[kPositions];
    for (int u = 0; u < kIn; ++u) {
      for (int v = 0; v < kIn; ++v) {
        const int y = y0 + u, x = x0 + v;
        const bool inside = y >= 0 && y < rows.in && x >= 0 && x < columns.in;
        pixels[u * kIn + v] = inside ? in + (int64_t{y} * columns.in + x) * channels : zeros_.data();
      }
    }
    kernels_.winograd_input(pixels, channels, transformed + int64_t{t} * channels, in_stride_);
  }
}

void Winograd::transform_outputs(const Operands& operands, const float* products, int64_t first, int count) const {
  const Axis &rows = geometry_.axis[0], &columns = geometry_.axis[1];
  const int channels = geometry_.out_channels, total = tiles_y_ * tiles_x_;
  for (int t = 0; t < count; ++t) {
    const int64_t image = (first + t) / total;
    const int tile = static_cast<int>((first + t) % total);
    const int y = tile / tiles_x_ * outputs_, x = tile % tiles_x_ * outputs_;
    const int64_t at = (int64_t{y} * columns.out + x) * channels;
    kernels_.winograd_output({products + int64_t{t} * channels, out_stride_, bias_.data(),
                              operands.out + image * operands.out_stride + at,
                              operands.addend ? operands.addend + image * operands.addend_stride + at : nullptr,
                              int64_t{columns.out} * channels, channels, outputs_, std::min(outputs_, rows.out - y),
                              std::min(outputs_, columns.out - x), operands.activation});
  }
}

void Winograd::run_tiles(const Operands& operands, int64_t first, int64_t last, float* scratch) const {
  float* products = scratch + kPositions * in_stride_;
  for (; first < last; first += chunk_) {
    const int count = static_cast<int>(std::min<int64_t>(chunk_, last - first));
    transform_inputs(operands, first, count, scratch);
    product_.run(0, kPositions, count, scratch, in_stride_, products, out_stride_, nullptr);
    transform_outputs(operands, products, first, count);
  }
}

void Winograd::run(const Operands& operands, Share share, float* scratch) const {
  const int64_t total = operands.images * tiles_y_ * tiles_x_;
  run_tiles(operands, share.begin(total), share.end(total), scratch);
}

// As many tiles as go through all three stages together, or most of them.
int Winograd::row_step() const { return outputs_ * std::max(1, chunk_ / tiles_x_); }

void Winograd::run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const {
  run_tiles(operands, int64_t{first_row / outputs_} * tiles_x_, int64_t{ceil_div(last_row, outputs_)} * tiles_x_,
            scratch);
}

}  // namespace fastinv
