// The matrix products in the middle of a Winograd form: for each of its positions tiles × in channels times in × out.
#pragma once

#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace fastinv {

class Product {
 public:
  // `matrices` of in × out, all 0 at first. With `bfloat16` factors are rounded to that, and sums are float32.
  Product(const Kernels& kernels, int in, int out, int matrices, bool bfloat16);

  void set(int matrix, int in, int out, double value);

  // For each of the first so many matrices: rows [row][in] at `from` to [row][out] at `to`, from_step and to_step
  // floats on for the next one. `scratch` has scratch_floats(rows) floats. Abreast, each number of a row is a
  // vector, one for each image; not with bfloat16.
  void run(int matrices, int rows, const float* from, int64_t from_step, float* to, int64_t to_step, float* scratch,
           bool abreast = false) const;
  int64_t scratch_floats(int rows) const;

  // The float32 weights of a matrix, in blocks of channels as `correlate` takes them; not with bfloat16.
  const float* weights(int matrix) const { return weights_.data() + matrix * size_; }

 private:
  const Kernels& kernels_;
  const int in_, out_;
  const bool bfloat16_;
  int64_t size_;  // of a matrix, in elements
  std::vector<Tile> tiles_;
  std::vector<Run> runs_;
  Buffer weights_;
};

}  // namespace fastinv
