#include "planar_winograd.h"

#include <algorithm>

#include "cost.h"
#include "winograd.h"

namespace fastinv {
namespace {

constexpr int kOut = 4, kIn = 6;
constexpr int kMostOutputs = 8;  // more fill vectors of channels, which is what most layers that read them want

// Of 32 KiB of L1, beside weights and products; but with less than 16 channels the sums go in and out too often (112
// columns by 6 channels: a tenth slower).
constexpr int64_t kChunkFloats = 20 * 1024 / sizeof(float);
constexpr int kMinChunk = 16;

}  // namespace

bool PlanarWinograd::applies(const Geometry& g) {
  const auto fits = [](const Axis& a) { return a.stride == 1 && a.dilation == 1; };
  return g.groups == 1 && fits(g.axis[0]) && fits(g.axis[1]) && g.axis[0].kernel == 3 &&
         g.axis[1].kernel < kMaxPlanarTaps && g.out_channels <= kMostOutputs;
}

PlanarWinograd::PlanarWinograd(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight,
                               const float* bias)
    : kernels_(kernels),
      geometry_(geometry),
      block_(planar_block(geometry)),
      tiles_(ceil_div(geometry.axis[0].out, kOut)),
      bias_(geometry.out_channels) {
  for (int axis = 0; axis < 2; ++axis) {
    const Axis& a = geometry.axis[axis];
    padding_[axis] = geometry.transposed ? a.kernel - 1 - a.padding : a.padding;
  }
  const Axis& x = geometry.axis[1];
  const int width = kernels.width;
  products_row_ = round_up(x.out, width);
  const int64_t in_row = round_up(x.in, width);
  const int64_t beyond = products_row_ - padding_[1] + x.kernel - 1 - in_row;
  margin_ = round_up(std::max<int64_t>({padding_[1], beyond, 0}), width);
  pitch_ = in_row + margin_;
  const int most = geometry.in_channels, least = std::min(kMinChunk, most);
  const int fitting = static_cast<int>(std::clamp<int64_t>(kChunkFloats / (kIn * pitch_), least, most));
  chunk_ = ceil_div(most, ceil_div(most, fitting));
  if (bias) std::copy_n(bias, geometry.out_channels, bias_.data());
  pack(weight);
}

// [block of channels][pass][in channel][column tap][position][channel], as many positions as go into a pass.
void PlanarWinograd::pack(const WeightAt& weight) {
  const Geometry& g = geometry_;
  const int taps = g.axis[1].kernel;
  weights_ = Buffer(int64_t{kIn} * g.in_channels * g.out_channels * taps);
  int64_t at = 0;
  for (int first = 0; first < g.out_channels; first += block_) {
    const int outputs = std::min(block_, g.out_channels - first);
    const int positions = kernels_.planar_winograd_positions[outputs];
    for (int pass = 0; pass < kIn; pass += positions) {
      for (int i = 0; i < g.in_channels; ++i) {
        for (int x = 0; x < taps; ++x) {
          for (int u = pass; u < pass + positions; ++u) {
            for (int o = first; o < first + outputs; ++o, ++at) {
              double sum = 0.0;  // of G·g
              for (int y = 0; y < 3; ++y) {
                // A transposed convolution of stride 1 is a plain one with its taps turned round.
                sum +=
                    winograd_g(3, u, y) * (g.transposed ? weight(0, o, i, 2 - y, taps - 1 - x) : weight(0, o, i, y, x));
              }
              weights_[at] = static_cast<float>(sum);
            }
          }
        }
      }
    }
  }
}

int64_t PlanarWinograd::scratch_floats(int64_t) const {
  return kIn * (chunk_ * pitch_ + geometry_.out_channels * products_row_) + margin_;
}

int PlanarWinograd::row_step() const { return kOut; }

std::string PlanarWinograd::algorithm() const {
  return "planar winograd 4x" + std::to_string(block_) + ", chunk " + std::to_string(chunk_);
}

void PlanarWinograd::run_tiles(const Operands& x, int64_t first, int64_t last, float* scratch) const {
  const Geometry& g = geometry_;
  const Axis &rows = g.axis[0], &columns = g.axis[1];
  const int64_t transformed = kIn * chunk_ * pitch_ + margin_;
  std::fill_n(scratch, transformed, 0.0f);
  // Each tile fetches its part of the next image, spread over the channels.
  const int64_t part = int64_t{g.in_channels} * rows.in * columns.in / tiles_;
  const int64_t step = round_up((part + g.in_channels - 1) / g.in_channels, kLineFloats);
  for (int64_t t = first; t < last; ++t) {
    const int64_t image = t / tiles_, tile = t % tiles_;
    const int row = static_cast<int>(tile) * kOut, in_row = row - padding_[0];
    const bool more = image + 1 < x.images + x.ahead;
    const int64_t at = int64_t{row} * columns.out;
    kernels_.planar_winograd({x.in + image * x.in_stride + int64_t{in_row} * columns.in,
                              x.out + image * x.out_stride + at,
                              x.addend ? x.addend + image * x.addend_stride + at : nullptr,
                              weights_.data(),
                              bias_.data(),
                              scratch,
                              scratch + transformed,
                              margin_,
                              pitch_,
                              products_row_,
                              g.in_channels,
                              rows.in,
                              columns.in,
                              g.out_channels,
                              rows.out,
                              columns.out,
                              columns.kernel,
                              -padding_[1],
                              block_,
                              chunk_,
                              in_row,
                              std::min(kOut, rows.out - row),
                              more ? x.in + (image + 1) * x.in_stride + tile * part : nullptr,
                              more ? static_cast<int>(step) : 0,
                              x.activation});
  }
}

void PlanarWinograd::run(const Operands& operands, Share share, float* scratch) const {
  const int64_t total = operands.images * tiles_;
  run_tiles(operands, share.begin(total), share.end(total), scratch);
}

void PlanarWinograd::run_rows(const Operands& operands, int first_row, int last_row, float* scratch) const {
  run_tiles(operands, first_row / kOut, ceil_div(last_row, kOut), scratch);
}

}  // namespace fastinv
