// Between the layout at the public door, [C, H, W] row-major, and the internal one, [H, W, C].
#pragma once

// out[j · out_step + i] = in[i · in_step + j] for i < rows, j < columns; block by block in registers.
void transpose(const float* in, int64_t in_step, float* out, int64_t out_step, int64_t rows, int64_t columns) {
  const int64_t whole_rows = rows / kWidth * kWidth, whole_columns = columns / kWidth * kWidth;
  for (int64_t i = 0; i < whole_rows; i += kWidth) {
    for (int64_t j = 0; j < whole_columns; j += kWidth) {
      transpose_block(in + i * in_step + j, in_step, out + j * out_step + i, out_step);
    }
  }
  const auto rest = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = j0; j < j1; ++j) out[j * out_step + i] = in[i * in_step + j];
    }
  };
  rest(0, whole_rows, whole_columns, columns);
  rest(whole_rows, rows, 0, columns);
}
