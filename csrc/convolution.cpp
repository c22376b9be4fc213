#include "convolution.h"

#include <algorithm>
#include <utility>

#include "correlation.h"
#include "cost.h"
#include "winograd.h"

namespace fastinv {

Geometry Geometry::adjoint() const {
  Geometry g = *this;
  g.transposed = !transposed;
  std::swap(g.in_channels, g.out_channels);
  for (Axis& a : g.axis) std::swap(a.in, a.out);
  return g;
}

std::unique_ptr<const Convolution> make_convolution(const Kernels& kernels, const Geometry& geometry,
                                                    const WeightAt& weight, const float* bias) {
  const double direct = std::min(broadcast_cost(kernels, geometry), dot_cost(kernels, geometry));
  if (Winograd::applies(geometry) && winograd_cost(kernels, geometry) < direct) {
    return std::make_unique<Winograd>(kernels, geometry, weight, bias);
  }
  return std::make_unique<Correlation>(kernels, geometry, weight, bias);
}

}  // namespace fastinv
