// Between the layout at the public door, [C, H, W] row-major, and the internal one, [H, W, C].
#pragma once

// out[j, i] = in[i, j] for in [rows, columns], block by block in registers.
void transpose(const float* in, float* out, int64_t rows, int64_t columns) {
  if (rows == 1 || columns == 1) {
    memcpy(out, in, static_cast<size_t>(rows * columns) * sizeof(float));
    return;
  }
  const int64_t whole_rows = rows / kWidth * kWidth, whole_columns = columns / kWidth * kWidth;
  for (int64_t i = 0; i < whole_rows; i += kWidth) {
    for (int64_t j = 0; j < whole_columns; j += kWidth) {
      transpose_block(in + i * columns + j, columns, out + j * rows + i, rows);
    }
  }
  const auto rest = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = j0; j < j1; ++j) out[j * rows + i] = in[i * columns + j];
    }
  };
  rest(0, whole_rows, whole_columns, columns);
  rest(whole_rows, rows, 0, columns);
}
