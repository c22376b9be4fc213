#include "cost.h"

#include <algorithm>

namespace fastinv {
namespace {

// Taps that an output pixel sums over along an axis; a strided transposed convolution splits its taps by phase.
double taps(const Geometry& g, int axis) {
  return double(g.axis[axis].kernel) / (g.transposed ? g.axis[axis].stride : 1);
}

}  // namespace

double broadcast_cost(const Kernels& kernels, const Geometry& g) {
  const int in = g.in_channels / g.groups, out = g.out_channels / g.groups;
  return taps(g, 0) * taps(g, 1) * in * ceil_div(out, kernels.width);
}

double dot_cost(const Kernels& kernels, const Geometry& g) {
  const int in = g.in_channels / g.groups, out = g.out_channels / g.groups, width = kernels.width;
  // Taps side by side are one run, so only its end leaves lanes empty.
  const bool merged = g.groups == 1 && (g.transposed || g.axis[1].dilation == 1);
  const double run = merged ? taps(g, 1) * in : in, runs = merged ? taps(g, 0) : taps(g, 0) * taps(g, 1);
  const double reduction = 6.0;  // instructions to sum the lanes of one accumulator
  return out * (runs * std::max(1.0, (run + width - 1) / width) + reduction);
}

double winograd_cost(const Kernels& kernels, const Geometry& g) {
  const int in = ceil_div(g.in_channels, kernels.width), out = ceil_div(g.out_channels, kernels.width);
  const double tiles = double(ceil_div(g.axis[0].out, 4)) * ceil_div(g.axis[1].out, 4);
  // For each tile 36 products, and the transforms: loads, stores and some 150 additions of vectors. Spills and the
  // second pass through memory make them count about double.
  const double tile = 36.0 * g.in_channels * out + 450.0 * in + 350.0 * out;
  return tiles * tile / (double(g.axis[0].out) * g.axis[1].out);
}

}  // namespace fastinv
