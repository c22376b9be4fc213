// The cost model that chooses algorithms: vector instructions per output pixel, from shapes and vector width alone.
#pragma once

#include "convolution.h"
#include "polyphase.h"

namespace fastinv {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

double broadcast_cost(const Kernels& kernels, const Geometry& geometry);
// Output channels and row taps that the planar form takes at once.
int planar_block(const Geometry& geometry);
int planar_taps(int outputs, int taps);
double planar_cost(const Kernels& kernels, const Geometry& geometry);
double planar_winograd_cost(const Kernels& kernels, const Geometry& geometry);

// What it costs to bring the input from [C, H, W] to [H, W, C].
double layout_cost(const Kernels& kernels, const Geometry& geometry);

double dot_cost(const Kernels& kernels, const Geometry& geometry);

// Of a 3×3 or 5×5 convolution of stride 1 and one group.
double winograd_cost(const Kernels& kernels, const Geometry& geometry);
double winograd_adjoint_cost(const Kernels& kernels, const Geometry& geometry);

// Of a transposed convolution of stride 2, in one of its forms; the squared relative error of that form, above
// float32's; and the best of those that add no more than `rounding` to it.
double polyphase_cost(const Kernels& kernels, const Geometry& geometry, PolyphaseForm form);
double polyphase_rounding(const Geometry& geometry, PolyphaseForm form);
PolyphaseForm polyphase_form(const Kernels& kernels, const Geometry& geometry, double rounding);

// Of products of bfloat16 tiles, which are about so many vector instructions each; and what they add to the squared
// relative error.
double amx_cost(const Geometry& geometry, Layouts layouts);
constexpr double kAmxRounding = 9e-6;

}  // namespace fastinv
