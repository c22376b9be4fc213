#include "convolution.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "amx.h"
#include "correlation.h"
#include "cost.h"
#include "depthwise.h"
#include "planar.h"
#include "planar_winograd.h"
#include "polyphase.h"
#include "winograd.h"

namespace fastinv {

bool Geometry::source(int axis, int out, int tap, int* position) const {
  const Axis& a = this->axis[axis];
  if (!transposed) {
    *position = out * a.stride + tap * a.dilation - a.padding;
    return true;
  }
  const int scaled = out + a.padding - tap * a.dilation;
  *position = scaled / a.stride;
  return scaled % a.stride == 0;
}

int Geometry::phases(int axis) const {
  return transposed ? std::min(this->axis[axis].stride, this->axis[axis].out) : 1;
}

std::vector<int> Geometry::phase_taps(int axis, int phase) const {
  std::vector<int> taps;
  int position;
  for (int k = 0; k < this->axis[axis].kernel; ++k) {
    if (source(axis, phase, k, &position)) taps.push_back(k);
  }
  if (transposed) std::reverse(taps.begin(), taps.end());
  return taps;
}

Geometry Geometry::adjoint() const {
  Geometry g = *this;
  g.transposed = !transposed;
  std::swap(g.in_channels, g.out_channels);
  for (Axis& a : g.axis) std::swap(a.in, a.out);
  return g;
}

int Geometry::first_row_read(int row) const {
  const Axis& a = axis[0];
  if (!transposed) return row * a.stride - a.padding;
  const int scaled = row + a.padding - (a.kernel - 1) * a.dilation;
  return scaled < 0 ? -(-scaled / a.stride) : ceil_div(scaled, a.stride);
}

int Geometry::last_row_read(int row) const {
  const Axis& a = axis[0];
  return transposed ? (row + a.padding) / a.stride : row * a.stride - a.padding + (a.kernel - 1) * a.dilation;
}

bool Geometry::reads_all() const {
  for (int i = 0; i < 2; ++i) {
    std::vector<bool> read(static_cast<size_t>(axis[i].in));
    for (int o = 0; o < axis[i].out; ++o) {
      for (int k = 0; k < axis[i].kernel; ++k) {
        int position;
        if (source(i, o, k, &position) && inside(i, position)) read[static_cast<size_t>(position)] = true;
      }
    }
    if (std::find(read.begin(), read.end(), false) != read.end()) return false;
  }
  return true;
}

namespace {

double direct_cost(const Kernels& kernels, const Geometry& geometry) {
  return std::min(broadcast_cost(kernels, geometry), dot_cost(kernels, geometry));
}

bool prefers_winograd(const Kernels& kernels, const Geometry& geometry) {
  return Winograd::applies(geometry) && winograd_cost(kernels, geometry) < direct_cost(kernels, geometry);
}

double best_polyphase_cost(const Kernels& kernels, const Geometry& geometry) {
  return polyphase_cost(kernels, geometry, polyphase_form(kernels, geometry, 0.0));
}

bool prefers_polyphase(const Kernels& kernels, const Geometry& geometry) {
  return Polyphase::applies(geometry) && best_polyphase_cost(kernels, geometry) < direct_cost(kernels, geometry);
}

double channels_last_cost(const Kernels& kernels, const Geometry& geometry) {
  if (prefers_winograd(kernels, geometry)) return winograd_cost(kernels, geometry);
  if (prefers_polyphase(kernels, geometry)) return best_polyphase_cost(kernels, geometry);
  return direct_cost(kernels, geometry);
}

// Images abreast take Planar's form.
bool prefers_planar_winograd(const Kernels& kernels, const Geometry& geometry, bool abreast) {
  return !abreast && PlanarWinograd::applies(geometry) &&
         planar_winograd_cost(kernels, geometry) < planar_cost(kernels, geometry);
}

double row_major_cost(const Kernels& kernels, const Geometry& geometry, bool abreast) {
  if (prefers_planar_winograd(kernels, geometry, abreast)) return planar_winograd_cost(kernels, geometry);
  // Of images abreast over one at a time, measured from 8×8 to 28×28; the tiles of 16 registers are too small to gain.
  const double gain = abreast && kernels.max_vectors > 2 ? 0.6 : 1.0;
  return gain * planar_cost(kernels, geometry);
}

}  // namespace

Choice choose(const Kernels& kernels, const Geometry& geometry, Layout input, bool abreast, const double* rounding) {
  const double conversion = layout_cost(kernels, geometry);
  double least = channels_last_cost(kernels, geometry) + (input == Layout::kRowMajor ? conversion : 0.0);
  Choice best;
  if (Planar::applies(geometry)) {
    const double cost = row_major_cost(kernels, geometry, abreast);
    const double planar = cost + (input == Layout::kChannelsLast ? conversion : 0.0);
    if (planar < least) {
      best.layouts = {true, true};
      least = planar;
    }
  }
  if (rounding && *rounding >= kAmxRounding && Amx::applies(kernels, geometry)) {
    const Layouts layouts = {input == Layout::kRowMajor, Amx::gives_row_major(geometry)};
    if (amx_cost(geometry, layouts) < least) best = {layouts, true};
  }
  return best;
}

std::unique_ptr<Convolution> make_convolution(const Kernels& kernels, const Geometry& geometry, const WeightAt& weight,
                                              const float* bias, const Choice& choice, bool abreast, double* rounding) {
  if (choice.amx) {
    *rounding -= kAmxRounding;
    return std::make_unique<Amx>(kernels, geometry, weight, bias, choice.layouts);
  }
  if (choice.layouts.in_row_major && prefers_planar_winograd(kernels, geometry, abreast)) {
    return std::make_unique<PlanarWinograd>(kernels, geometry, weight, bias);
  }
  if (choice.layouts.in_row_major) return std::make_unique<Planar>(kernels, geometry, weight, bias);
  if (prefers_winograd(kernels, geometry)) {
    return std::make_unique<Winograd>(kernels, geometry, weight, bias);
  }
  if (prefers_polyphase(kernels, geometry)) {
    const PolyphaseForm form = polyphase_form(kernels, geometry, rounding ? *rounding : 0.0);
    if (rounding) *rounding -= polyphase_rounding(geometry, form);
    return std::make_unique<Polyphase>(kernels, geometry, form, weight, bias);
  }
  if (Depthwise::applies(geometry)) return std::make_unique<Depthwise>(kernels, geometry, weight, bias);
  return std::make_unique<Correlation>(kernels, geometry, weight, bias);
}

std::unique_ptr<const Convolution> make_gradient(const Kernels& kernels, const Geometry& geometry,
                                                 const WeightAt& weight, const Choice& forward) {
  const Layouts layouts = {forward.layouts.out_row_major, forward.layouts.in_row_major};
  double least = channels_last_cost(kernels, geometry);
  const bool backwards = !layouts.in_row_major && Winograd::applies(geometry) && Winograd::shrinks(geometry) &&
                         winograd_adjoint_cost(kernels, geometry) < least;
  if (backwards) least = winograd_adjoint_cost(kernels, geometry);
  if (forward.amx && Amx::applies(kernels, geometry) && amx_cost(geometry, layouts) < least) {
    return std::make_unique<Amx>(kernels, geometry, weight, nullptr, layouts);
  }
  if (backwards) return std::make_unique<Winograd>(kernels, geometry, weight);
  return make_convolution(kernels, geometry, weight, nullptr, {layouts}, false, nullptr);
}

}  // namespace fastinv
