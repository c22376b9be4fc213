#include "product.h"

#include <algorithm>
#include <cstring>

#include "bfloat16.h"
#include "cost.h"

namespace fastinv {

Product::Product(const Kernels& kernels, int in, int out, int matrices, bool bfloat16)
    : kernels_(kernels), in_(in), out_(out), bfloat16_(bfloat16) {
  // bfloat16 takes input channels in pairs, two to a float's memory.
  size_ = round_up(in, bfloat16 ? 2 : 1) * round_up(out, kernels.width);
  weights_ = Buffer::for_work(bfloat16 ? size_ / 2 * matrices : size_ * matrices);
  for (int pixels = 1; pixels <= kMaxTilePixels; ++pixels) {  // tile k holds k + 1 rows
    Tile tile = {};
    Run run = {};
    tile.first_run = pixels - 1;
    tile.runs = 1;
    tile.pixels = pixels;
    run.length = in;
    for (int p = 0; p < pixels; ++p) {
      run.offset[p] = p * in;
      tile.out[p] = p * out;
    }
    tiles_.push_back(tile);
    runs_.push_back(run);
  }
}

void Product::set(int matrix, int in, int out, double value) {
  const int block = kernels_.max_vectors * kernels_.width, padded = static_cast<int>(round_up(out_, kernels_.width));
  const int first = out / block * block, span = std::min(block, padded - first);
  if (bfloat16_) {
    const int64_t at = matrix * size_ + int64_t{first} * round_up(in_, 2) + (int64_t{in} / 2 * span + out - first) * 2;
    const uint16_t rounded = to_bfloat16(static_cast<float>(value));
    std::memcpy(reinterpret_cast<char*>(weights_.data()) + (at + in % 2) * 2, &rounded, sizeof rounded);
  } else {
    weights_[matrix * size_ + int64_t{first} * in_ + int64_t{in} * span + out - first] = static_cast<float>(value);
  }
}

int64_t Product::scratch_floats(int rows) const { return bfloat16_ ? rows * round_up(in_, 2) / 2 : 0; }

void Product::run(int matrices, int rows, const float* from, int64_t from_step, float* to, int64_t to_step,
                  float* scratch, bool abreast) const {
  if (bfloat16_) {
    for (int k = 0; k < matrices; ++k) {
      kernels_.bfloat16_product({from + k * from_step, to + k * to_step, reinterpret_cast<uint16_t*>(scratch),
                                 reinterpret_cast<const uint16_t*>(weights_.data()) + k * size_, rows, in_, out_});
    }
    return;
  }
  if (!abreast) return kernels_.product({from, from_step, to, to_step, weights(0), matrices, rows, in_, out_});
  constexpr int kMostTiles = 64;  // at once
  const int tiles = ceil_div(rows, kMaxTilePixels);
  TileRow tile[kMostTiles];
  for (int done = 0, begin = 0; done < tiles; done += kMostTiles) {
    const int count = std::min(kMostTiles, tiles - done);
    for (int t = 0; t < count; ++t) {
      const int size = rows / tiles + (done + t < rows % tiles ? 1 : 0);
      tile[t] = {size - 1, 1, int64_t{begin} * in_, int64_t{begin} * out_};
      begin += size;
    }
    for (int k = 0; k < matrices; ++k) {
      kernels_.correlate_abreast({from + k * from_step,
                                  to + k * to_step,
                                  nullptr,
                                  tile,
                                  count,
                                  tiles_.data(),
                                  runs_.data(),
                                  weights(k),
                                  in_,
                                  nullptr,
                                  out_,
                                  nullptr,
                                  {}});
    }
  }
}

}  // namespace fastinv
