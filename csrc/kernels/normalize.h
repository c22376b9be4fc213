// Norms on the statistics of the image itself, and the way back: y = (x − μ) / σ · weight + bias.
#pragma once

#include "kernels/vectors.h"

constexpr int kChains = 4;  // of sums side by side: an addition waits four cycles for the one before

// Sums of one or several things over elements 0 to size, lane by lane, over stretches and then over those: so few
// additions follow each other that sums keep float32's digits. step(acc, i, lanes) adds elements i to i + lanes, and
// nothing under other lanes.
template <int kTerms, class Step>
FASTINV_INLINE void sums_along(int64_t size, V* sums, Step step) {
  constexpr int64_t kStretch = 1024;
  for (int t = 0; t < kTerms; ++t) sums[t] = zero();
  for (int64_t begin = 0; begin < size; begin += kStretch) {
    const int64_t end = begin + kStretch < size ? begin + kStretch : size;
    V acc[kChains][kTerms];
    for (int k = 0; k < kChains; ++k) {
      for (int t = 0; t < kTerms; ++t) acc[k][t] = zero();
    }
    int64_t i = begin;
    for (; i + kChains * kWidth <= end; i += kChains * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) step(acc[k], i + k * kWidth, kWidth);
    }
    for (; i < end; i += kWidth) step(acc[0], i, end - i < kWidth ? static_cast<int>(end - i) : kWidth);
    for (int t = 0; t < kTerms; ++t) sums[t] = add(sums[t], add(add(acc[0][t], acc[1][t]), add(acc[2][t], acc[3][t])));
  }
}

// The same down the columns of a matrix of `rows` rows, for kVectors vectors of columns, of which the last has `lanes`
// columns: step(acc, row, column, lanes). Sums of term t go to sums[t · sums_step]; stretches are added in float64.
template <int kTerms, int kVectors, class Step>
FASTINV_INLINE void sums_down(int64_t rows, int lanes, float* sums, int64_t sums_step, Step step) {
  constexpr int kColumns = kVectors * kWidth;
  constexpr int64_t kRows = 256;  // a stretch
  double totals[kTerms][kColumns] = {};
  const auto width = [lanes](int v) { return v == kVectors - 1 ? lanes : kWidth; };
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t end = begin + kRows < rows ? begin + kRows : rows;
    V acc[kChains][kVectors][kTerms];
    for (int k = 0; k < kChains; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        for (int t = 0; t < kTerms; ++t) acc[k][v][t] = zero();
      }
    }
    int64_t row = begin;
    for (; row + kChains <= end; row += kChains) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) step(acc[k][v], row + k, v * kWidth, width(v));
      }
    }
    for (; row < end; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) step(acc[0][v], row, v * kWidth, width(v));
    }
    for (int t = 0; t < kTerms; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        float columns[kWidth];
        store(columns, add(add(acc[0][v][t], acc[1][v][t]), add(acc[2][v][t], acc[3][v][t])));
        for (int c = 0; c < kWidth; ++c) totals[t][v * kWidth + c] += static_cast<double>(columns[c]);
      }
    }
  }
  for (int t = 0; t < kTerms; ++t) {
    for (int c = 0; c < (kVectors - 1) * kWidth + lanes; ++c) {
      sums[t * sums_step + c] = static_cast<float>(totals[t][c]);
    }
  }
}

// The same for so many columns. How one is added up does not depend on the others.
template <int kTerms, class Step>
FASTINV_INLINE void sums_of_columns(int64_t rows, int64_t columns, float* sums, int64_t sums_step, Step step) {
  constexpr int kVectors = 2 / kTerms;  // 8 sums of AVX2's 16 registers
  int64_t c = 0;
  const auto from = [&c, &step](V* acc, int64_t row, int64_t column, int lanes) { step(acc, row, c + column, lanes); };
  for (; c + kVectors * kWidth <= columns; c += kVectors * kWidth) {
    sums_down<kTerms, kVectors>(rows, kWidth, sums + c, sums_step, from);
  }
  for (; c < columns; c += kWidth) {
    const int lanes = columns - c < kWidth ? static_cast<int>(columns - c) : kWidth;
    sums_down<kTerms, 1>(rows, lanes, sums + c, sums_step, from);
  }
}

// 1 / σ, from a sum of squared differences.
FASTINV_INLINE float inverse_deviation(double squares, double count, float eps) {
  return 1.0f / sqrtf(static_cast<float>(squares / count + static_cast<double>(eps)));
}

// A row of so many elements, or a group of channels of one.
struct NormalizedRow {
  int64_t size, at, channel;  // where it begins, and which channel with

  NormalizedRow(const NormalizeArgs& a, int64_t unit)
      : size(a.channels / a.groups), at(unit * size), channel(unit % a.groups * size) {}
};

// As many rows as a vector has lanes at once: their sums are added up and become statistics side by side.
void normalize_rows(const NormalizeArgs& a) {
  const int64_t last = a.last * a.groups;
  const V count = set1(static_cast<float>(a.channels / a.groups));
  for (int64_t first = a.first * a.groups; first < last; first += kWidth) {
    const int rows = last - first < kWidth ? static_cast<int>(last - first) : kWidth;
    V parts[kWidth];
    for (V& part : parts) part = zero();
    float mean[kWidth] = {}, inverse[kWidth];
    if (a.centered) {
      for (int r = 0; r < rows; ++r) {
        const NormalizedRow row(a, first + r);
        const float* x = a.in + row.at;
        sums_along<1>(row.size, &parts[r],
                      [x](V* acc, int64_t i, int lanes) { acc[0] = add(acc[0], load_first(x + i, lanes)); });
      }
      store(mean, div(sum_each(parts), count));
    }
    for (int r = 0; r < rows; ++r) {
      const NormalizedRow row(a, first + r);
      const float* x = a.in + row.at;
      const V center = set1(mean[r]);
      sums_along<1>(row.size, &parts[r], [x, center](V* acc, int64_t i, int lanes) {
        const V d = sub(load_first(x + i, lanes), center), seen = lanes == kWidth ? d : first_of(d, lanes);
        acc[0] = fma(seen, seen, acc[0]);
      });
    }
    store(inverse, div(set1(1.0f), sqrt(add(div(sum_each(parts), count), set1(a.eps)))));
    for (int r = 0; r < rows; ++r) {
      if (a.statistics) {
        a.statistics[2 * (first + r)] = mean[r];
        a.statistics[2 * (first + r) + 1] = inverse[r];
      }
      const NormalizedRow row(a, first + r);
      const float *x = a.in + row.at, *weight = a.weight + row.channel, *bias = a.bias + row.channel;
      float* y = a.out + row.at;
      const V center = set1(mean[r]), scale = set1(inverse[r]);
      for_vectors(row.size, [&](int64_t i, int lanes) {
        const V unit = mul(sub(load_first(x + i, lanes), center), scale);
        const V result = fma(unit, load_first(weight + i, lanes), load_first(bias + i, lanes));
        store_first(y + i, activate(result, a.activation), lanes);
      });
    }
  }
}

// What all channels of a group share goes to each of them: body(group, first channel, last channel).
template <class Body>
FASTINV_INLINE void for_groups(const NormalizeArgs& a, Body body) {
  const int64_t size = a.channels / a.groups;
  for (int64_t g = a.first; g < a.last; ++g) body(g, g * size, (g + 1) * size);
}

void normalize_pixels(const NormalizeArgs& a) {
  const int64_t size = a.channels / a.groups, channels = a.channels, begin = a.first * size,
                count = a.last * size - begin;
  const double elements = static_cast<double>(size) * static_cast<double>(a.rows);
  const float* x = a.in + begin;
  float *mean = a.scratch, *factor = a.scratch + channels;  // of each channel
  const auto group_sum = [](const float* sums, int64_t from, int64_t to) {
    double total = 0.0;
    for (int64_t c = from; c < to; ++c) total += static_cast<double>(sums[c]);
    return total;
  };
  if (a.centered) {
    sums_of_columns<1>(a.rows, count, mean + begin, 0, [x, channels](V* acc, int64_t row, int64_t c, int lanes) {
      acc[0] = add(acc[0], load_first(x + row * channels + c, lanes));
    });
  }
  for_groups(a, [&](int64_t, int64_t from, int64_t to) {
    const float m = a.centered ? static_cast<float>(group_sum(mean, from, to) / elements) : 0.0f;
    for (int64_t c = from; c < to; ++c) mean[c] = m;
  });
  const float* center = mean + begin;
  sums_of_columns<1>(a.rows, count, factor + begin, 0, [=](V* acc, int64_t row, int64_t c, int lanes) {
    const V d = sub(load_first(x + row * channels + c, lanes), load_first(center + c, lanes));
    acc[0] = fma(d, d, acc[0]);
  });
  for_groups(a, [&](int64_t g, int64_t from, int64_t to) {
    const float inverse = inverse_deviation(group_sum(factor, from, to), elements, a.eps);
    if (a.statistics) {
      a.statistics[2 * g] = mean[from];
      a.statistics[2 * g + 1] = inverse;
    }
    for (int64_t c = from; c < to; ++c) factor[c] = inverse * a.weight[c];
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* in = x + row * channels;
    float* out = a.out + begin + row * channels;
    for_vectors(count, [&](int64_t c, int lanes) {
      const V d = sub(load_first(in + c, lanes), load_first(center + c, lanes));
      const V y = fma(d, load_first(factor + begin + c, lanes), load_first(a.bias + begin + c, lanes));
      store_first(out + c, activate(y, a.activation), lanes);
    });
  }
}

void normalize(const NormalizeArgs& args) { args.spatial ? normalize_pixels(args) : normalize_rows(args); }

// With x̂ = (x − μ) / σ and g the gradient of y times the weight: that of x is (g − mean g − x̂ · mean(g · x̂)) / σ, the
// means over the group, or g / σ − shift − slope · (x − μ); without the first mean where μ is none.
void normalize_rows_gradient(const NormalizeGradientArgs& args) {
  const NormalizeArgs& a = args.norm;
  const int64_t last = a.last * a.groups;
  const V count = set1(static_cast<float>(a.channels / a.groups));
  for (int64_t first = a.first * a.groups; first < last; first += kWidth) {
    const int rows = last - first < kWidth ? static_cast<int>(last - first) : kWidth;
    V sums[kWidth], products[kWidth];
    float mean[kWidth] = {}, inverse[kWidth] = {}, shift[kWidth], slope[kWidth];
    for (int r = 0; r < kWidth; ++r) sums[r] = products[r] = zero();
    for (int r = 0; r < rows; ++r) {
      const NormalizedRow row(a, first + r);
      mean[r] = a.statistics[2 * (first + r)];
      inverse[r] = a.statistics[2 * (first + r) + 1];
      const float *x = a.in + row.at, *weight = a.weight + row.channel, *grad = args.grad_out + row.at;
      const V center = set1(mean[r]);
      V both[2];
      sums_along<2>(row.size, both, [=](V* acc, int64_t i, int lanes) {
        const V g = mul(load_first(grad + i, lanes), load_first(weight + i, lanes));
        acc[0] = add(acc[0], g);
        acc[1] = fma(g, sub(load_first(x + i, lanes), center), acc[1]);
      });
      sums[r] = both[0];
      products[r] = both[1];
    }
    const V scale = load(inverse), squared = mul(scale, scale);
    store(shift, a.centered ? div(mul(sum_each(sums), scale), count) : zero());
    store(slope, div(mul(mul(sum_each(products), scale), squared), count));
    for (int r = 0; r < rows; ++r) {
      const NormalizedRow row(a, first + r);
      const float *x = a.in + row.at, *weight = a.weight + row.channel, *grad = args.grad_out + row.at;
      float* into = args.grad_in + row.at;
      const V center = set1(mean[r]), factor = set1(inverse[r]), less = set1(shift[r]), falling = set1(-slope[r]);
      for_vectors(row.size, [&](int64_t i, int lanes) {
        const V g = mul(load_first(grad + i, lanes), load_first(weight + i, lanes));
        const V d = sub(load_first(x + i, lanes), center);
        V result = fma(d, falling, sub(mul(g, factor), less));
        if (args.accumulate) result = add(result, load_first(into + i, lanes));
        store_first(into + i, result, lanes);
      });
    }
  }
}

void normalize_pixels_gradient(const NormalizeGradientArgs& args) {
  const NormalizeArgs& a = args.norm;
  const int64_t size = a.channels / a.groups, channels = a.channels, begin = a.first * size,
                count = a.last * size - begin;
  const double elements = static_cast<double>(size) * static_cast<double>(a.rows);
  const float *x = a.in + begin, *grad = args.grad_out + begin;
  float *mean = a.scratch, *sums = mean + channels, *products = sums + channels, *factor = products + channels;
  for_groups(a, [&](int64_t g, int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) mean[c] = a.statistics[2 * g];
  });
  const float* center = mean + begin;
  sums_of_columns<2>(a.rows, count, sums + begin, channels, [=](V* acc, int64_t row, int64_t c, int lanes) {
    const V g = load_first(grad + row * channels + c, lanes);
    acc[0] = add(acc[0], g);
    acc[1] = fma(g, sub(load_first(x + row * channels + c, lanes), load_first(center + c, lanes)), acc[1]);
  });
  float *shift = sums, *slope = products;  // of each channel, in the end
  for_groups(a, [&](int64_t g, int64_t from, int64_t to) {
    double sum = 0.0, product = 0.0;
    for (int64_t c = from; c < to; ++c) {
      sum += static_cast<double>(a.weight[c]) * static_cast<double>(sums[c]);
      product += static_cast<double>(a.weight[c]) * static_cast<double>(products[c]);
    }
    const float inverse = a.statistics[2 * g + 1];
    const double scale = static_cast<double>(inverse);
    for (int64_t c = from; c < to; ++c) {
      shift[c] = a.centered ? static_cast<float>(sum * scale / elements) : 0.0f;
      slope[c] = -static_cast<float>(product * scale * scale * scale / elements);
      factor[c] = inverse * a.weight[c];
    }
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t at = row * channels;
    float* into = args.grad_in + begin + at;
    for_vectors(count, [&](int64_t c, int lanes) {
      const int64_t channel = begin + c;
      const V g = mul(load_first(grad + at + c, lanes), load_first(factor + channel, lanes));
      const V d = sub(load_first(x + at + c, lanes), load_first(center + c, lanes));
      V result = fma(d, load_first(slope + channel, lanes), sub(g, load_first(shift + channel, lanes)));
      if (args.accumulate) result = add(result, load_first(into + c, lanes));
      store_first(into + c, result, lanes);
    });
  }
}

void normalize_gradient(const NormalizeGradientArgs& args) {
  args.norm.spatial ? normalize_pixels_gradient(args) : normalize_rows_gradient(args);
}
