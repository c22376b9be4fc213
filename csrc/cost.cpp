#include "cost.h"

#include <algorithm>
#include <cmath>

#include "amx.h"
#include "buffer.h"
#include "polyphase.h"
#include "winograd.h"

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

int planar_block(const Geometry& g) {
  const int out = g.out_channels / g.groups;
  if (g.transposed && g.axis[1].stride == 2) return std::min(out, 2);
  if (out <= kMaxPlanarOutputs || out % kMaxPlanarOutputs == 0) return std::min(out, kMaxPlanarOutputs);
  return out % 3 == 0 ? 3 : kMaxPlanarOutputs;
}

int planar_taps(int outputs, int taps) {
  const int most = outputs == 1 ? 5 : outputs == 2 ? 3 : 1;  // with more outputs loads are no limit
  int best = 1;
  for (int n = 2; n <= std::min(most, taps); ++n) {
    if (round_up(taps, n) <= round_up(taps, best)) best = n;
  }
  return best;
}

double planar_cost(const Kernels& kernels, const Geometry& g) {
  const int step_x = g.transposed ? g.axis[1].stride : 1;
  const int outputs = planar_block(g) * step_x, columns = ceil_div(g.axis[1].out, step_x);
  const double filled = double(columns) / round_up(columns, kernels.width);
  const double per_row = planar_taps(outputs, static_cast<int>(std::ceil(taps(g, 0))));
  // Even and odd columns read one window, some of whose taps one of them lacks.
  const double window = step_x == 2 ? std::ceil((g.axis[1].kernel + 1) / 2.0) : taps(g, 1);
  const double products = taps(g, 0) * window * (g.in_channels / g.groups) * (g.out_channels / g.groups);
  const double load = 1.0 / (per_row * outputs);  // one for so many products, often across two cache lines
  return g.groups * products * (1.0 + 0.5 * load) / (filled * kernels.width);
}

double planar_winograd_cost(const Kernels& kernels, const Geometry& g) {
  const double tiles = double(ceil_div(g.axis[0].out, 4)) * ceil_div(g.axis[1].out, kernels.width);
  // The transform of an input channel, most of it stores and the way through L1, fitted to measurements of 2 to 4
  // output channels; and of an output channel.
  const double tile = g.in_channels * (6.0 * g.axis[1].kernel * g.out_channels + 40.0) + 20.0 * g.out_channels;
  return tiles * tile / (double(g.axis[0].out) * g.axis[1].out);
}

double layout_cost(const Kernels& kernels, const Geometry& g) {
  const double pixels = double(g.axis[0].in) * g.axis[1].in / (double(g.axis[0].out) * g.axis[1].out);
  // Load, four shuffles and store of a vector; beyond L2 it waits for memory.
  const bool resident = 2 * sizeof(float) * g.in_channels * g.axis[0].in * g.axis[1].in <= 512 * 1024;
  return (resident ? 6.0 : 30.0) * pixels * g.in_channels / kernels.width;
}

double winograd_cost(const Kernels& kernels, const Geometry& g) {
  const int in = ceil_div(g.in_channels, kernels.width), out = ceil_div(g.out_channels, kernels.width);
  const int outputs = winograd_outputs(g.axis[0].kernel);
  const double tiles = double(ceil_div(g.axis[0].out, outputs)) * ceil_div(g.axis[1].out, outputs);
  // For each tile 36 products, and the transforms: loads, stores and some 150 additions of vectors. Spills and the
  // second pass through memory make them count about double.
  const double tile = 36.0 * g.in_channels * out + 450.0 * in + (outputs == 4 ? 350.0 : 200.0) * out;
  return tiles * tile / (double(g.axis[0].out) * g.axis[1].out);
}

double winograd_adjoint_cost(const Kernels& kernels, const Geometry& g) {
  const int in = ceil_div(g.in_channels, kernels.width), out = ceil_div(g.out_channels, kernels.width);
  const int outputs = winograd_outputs(g.axis[0].kernel);
  const double tiles = double(ceil_div(g.axis[0].in, outputs)) * ceil_div(g.axis[1].in, outputs);
  // The plain form's transforms turned round, and results that are read before they are written.
  const double tile = 36.0 * g.in_channels * out + (outputs == 4 ? 350.0 : 200.0) * in + 550.0 * out;
  return tiles * tile / (double(g.axis[0].out) * g.axis[1].out);
}

double polyphase_cost(const Kernels& kernels, const Geometry& g, PolyphaseForm form) {
  const int in = ceil_div(g.in_channels, kernels.width), out = ceil_div(g.out_channels, kernels.width);
  double plain = 1.0, positions = 1.0;  // products of an image in the phase without transforms, and in all four
  for (const Axis& axis : g.axis) {
    double single = 0.0, all = 0.0;
    for (int first = 0; first < 2; ++first) {
      const AxisPhase phase = axis_phase(axis, first);
      if (phase.taps == 1) single += phase.outputs;
      all += phase.taps == 1 ? phase.outputs : ceil_div(phase.outputs, form.outputs) * (form.outputs + 1);
    }
    plain *= single;
    positions *= all;
  }
  // The transforms, fitted to measurements of 16 to 128 channels: most of it is stores and the way through L2, and the
  // last number is what a short product takes to begin and end. To round is one more way through L1.
  const double transforms = (form.bfloat16 ? 7.0 : 5.0) * in + 7.0 * out + 20.0;
  const double product = double(g.in_channels) * out;
  const double transformed = product / (form.bfloat16 ? 2.0 : 1.0) + transforms;
  return (plain * product + (positions - plain) * transformed) / (double(g.axis[0].out) * g.axis[1].out);
}

// The most of several random weights and features, and a half more for weights that are less kind.
double polyphase_rounding(const Geometry& g, PolyphaseForm form) {
  if (!form.bfloat16) return 0.0;
  const bool all = g.axis[0].kernel == 4 && g.axis[1].kernel == 4;  // phases have two taps along both axes
  return form.outputs == 2 ? 2.4e-5 : all ? 7.5e-5 : 3.5e-5;
}

PolyphaseForm polyphase_form(const Kernels& kernels, const Geometry& g, double rounding) {
  PolyphaseForm best = {4, false};
  for (const PolyphaseForm form : {PolyphaseForm{2, false}, PolyphaseForm{4, true}, PolyphaseForm{2, true}}) {
    const double error = polyphase_rounding(g, form);
    if (error <= rounding && polyphase_cost(kernels, g, form) < polyphase_cost(kernels, g, best)) best = form;
  }
  return best;
}

double amx_cost(const Geometry& g, Layouts layouts) {
  const double in = ceil_div(g.in_channels, kAmxDepth), out = ceil_div(g.out_channels, kAmxColumns);
  const Amx::Plan plan = Amx::plan(g, layouts.out_row_major);
  // A product of two tiles, 16 pixels, takes 16 cycles, and 75 on processors that share the unit or its power; with two
  // vectors multiplied a cycle that is 2 to 9 instructions a pixel.
  const double products = 5.0 * taps(g, 0) * taps(g, 1) * in * out / (plan.stacked * plan.filled);
  const double out_pixels = double(g.axis[0].out) * g.axis[1].out;
  const double rounding = (layouts.in_row_major ? 20.0 : 10.0) * in * g.axis[0].in * g.axis[1].in;
  return products + (rounding + 800.0) / out_pixels + 5.0 * out + 5.0;  // at last what becomes of the sums
}

}  // namespace fastinv
