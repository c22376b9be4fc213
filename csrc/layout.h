// Between the layout at the public door, [C, H, W] row-major, and the internal one, [H, W, C].
#pragma once

#include <cstdint>

namespace fastinv {

// out[j, i] = in[i, j] for in [rows, columns].
void transpose(const float* in, float* out, int64_t rows, int64_t columns);

}  // namespace fastinv
