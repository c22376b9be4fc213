// The gradient of the total variation (He et al. 2019, Algorithm 1), at the pixels of a thread.
#pragma once

#include <type_traits>

#include "pixels.h"

namespace fastinv {

// β/2 − 1 of the total variation: 0, −1/2, or anything.
enum class Power { kNone, kRoot, kAny };
template <class F>
FASTINV_BLOCK void with_power(const Descent& d, F&& f) {
  if (d.half_beta == 1.0f) return f(std::integral_constant<Power, Power::kNone>());
  if (d.half_beta == 0.5f) return f(std::integral_constant<Power, Power::kRoot>());
  f(std::integral_constant<Power, Power::kAny>());
}

// dy and dx at a pixel of the image, 0 over its border, and (dy² + dx² + root)^(β/2 − 1).
struct Differences {
  float dy, dx, factor;
};

template <Power kPower>
FASTINV_BLOCK Differences differences(const Descent& d, const Planes& image, int row, int column, int channel) {
  const float here = image.at(row, column, channel);
  const float dy = row + 1 < d.height ? image.at(row + 1, column, channel) - here : 0.0f;
  const float dx = column + 1 < d.width ? image.at(row, column + 1, channel) - here : 0.0f;
  float square = dy * dy + dx * dx + d.root;
  if (square < 1e-30f) square = 1e-30f;  // where a difference is 0 so is the slope; but not 0 · ∞
  return {dy, dx, kPower == Power::kRoot ? 1.0f / sqrtf(square) : powf(square, d.half_beta - 1.0f)};
}

// The gradient of tv_weight · TV_β at a pixel.
template <Power kPower>
FASTINV_BLOCK float variation_slope(const Descent& d, const Planes& image, int row, int column, int channel) {
  const Differences here = differences<kPower>(d, image, row, column, channel);
  float slope = -(here.dy + here.dx) * here.factor;
  if (row > 0) {
    const Differences above = differences<kPower>(d, image, row - 1, column, channel);
    slope += above.dy * above.factor;
  }
  if (column > 0) {
    const Differences left = differences<kPower>(d, image, row, column - 1, channel);
    slope += left.dx * left.factor;
  }
  return d.tv_weight * 2.0f * d.half_beta * slope;
}

// Adds it to the gradients of a thread's pixels, of which there is one.
template <Power kPower, class P>
FASTINV_BLOCK void add_variation(const Descent& d, const Planes& image, P& p) {
  const float weight = d.tv_weight * 2.0f;
  const int left = p.column > 0 ? -1 : 0, right = p.column + 1 < d.width ? 1 : 0;
#pragma unroll
  for (int c = 0; c < P::kChannels; ++c) {
    const float* at = &image.at(p.row, p.column, c);
    float here = at[0], above = p.row > 0 ? at[-image.pitch] : here;
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const int row = p.row + r;
      if (row >= d.height) break;
      // β 2: the differences from all four neighbours; over the border there is none.
      if constexpr (kPower == Power::kNone) {
        const float below = row + 1 < d.height ? at[image.pitch] : here;
        p.gradient[r][c] += weight * ((here - at[left]) + (here - at[right]) + (here - above) + (here - below));
        above = here, here = below, at += image.pitch;
      } else {
        p.gradient[r][c] += variation_slope<kPower>(d, image, row, p.column, c);
      }
    }
  }
}

}  // namespace fastinv
