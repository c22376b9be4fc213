#include "layout.h"

#include <algorithm>
#include <cstring>

namespace fastinv {

void transpose(const float* in, float* out, int64_t rows, int64_t columns) {
  if (rows == 1 || columns == 1) {
    std::memcpy(out, in, static_cast<size_t>(rows * columns) * sizeof(float));
    return;
  }
  constexpr int64_t kTile = 16;  // 16 × 16 floats of each side are 16 cache lines: both stay in L1
  for (int64_t i0 = 0; i0 < rows; i0 += kTile) {
    const int64_t i1 = std::min(i0 + kTile, rows);
    for (int64_t j0 = 0; j0 < columns; j0 += kTile) {
      const int64_t j1 = std::min(j0 + kTile, columns);
      for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = i0; i < i1; ++i) out[j * rows + i] = in[i * columns + j];
      }
    }
  }
}

}  // namespace fastinv
