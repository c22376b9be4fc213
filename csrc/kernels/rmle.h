// What an rMLE step needs beside the network: residual, total variation, optimizer.
#pragma once

// Sums run in float32 over stretches of this many floats, then in float64: the error of a sum of squares stays
// near 1e-7 however large the features are.
constexpr int64_t kSumStretch = 1024;

double residual(const float* y, const float* v, float* grad, int64_t size) {
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kSumStretch) {
    const int64_t end = begin + kSumStretch < size ? begin + kSumStretch : size;
    V acc = zero();
    for (int64_t i = begin; i < end; i += kWidth) {
      const int lanes = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
      const V d = sub(load_first(y + i, lanes), load_first(v + i, lanes));
      acc = fma(d, d, acc);
      store_first(grad + i, add(d, d), lanes);
    }
    total += static_cast<double>(sum(acc));
  }
  return total;
}

double squared_distance(const float* v, float from, int64_t size) {
  constexpr int kSums = 4;
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kSumStretch) {
    const int64_t end = begin + kSumStretch < size ? begin + kSumStretch : size;
    V sums[kSums] = {zero(), zero(), zero(), zero()};
    int64_t i = begin;
    for (; i + kSums * kWidth <= end; i += kSums * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) {
        const V d = sub(load(v + i + k * kWidth), set1(from));
        sums[k] = fma(d, d, sums[k]);
      }
    }
    for (; i < end; i += kWidth) {
      const int lanes = end - i < kWidth ? static_cast<int>(end - i) : kWidth;
      const V d = first_of(sub(load_first(v + i, lanes), set1(from)), lanes);
      sums[0] = fma(d, d, sums[0]);
    }
    total += static_cast<double>(sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
  }
  return total;
}

// s^{β/2−1} for exponents that are neither 0 nor −1/2.
FASTINV_INLINE V power(V s, float exponent) {
  float lanes[kWidth];
  store(lanes, s);
  for (int l = 0; l < kWidth; ++l) lanes[l] = powf(lanes[l], exponent);
  return load(lanes);
}

// β = 2: the gradient is 2·(dy above − dy + dx to the left − dx), which nothing has to be kept for.
double total_variation_of_squares(const TotalVariationArgs& a) {
  const int64_t row = static_cast<int64_t>(a.width) * a.channels, next = a.channels;
  const V scale = set1(2.0f * a.weight);
  double total = 0.0;
  for (int64_t i = 0; i < a.height; ++i) {
    const float* z = a.z + i * row;
    float* grad = a.grad + i * row;
    V acc = zero();
    for (int64_t k = 0; k < row; k += kWidth) {
      const int lanes = row - k < kWidth ? static_cast<int>(row - k) : kWidth;
      const Lanes has_next = lanes_between(0, static_cast<int>(row - next - k < kWidth ? row - next - k : kWidth));
      const Lanes has_last = lanes_between(static_cast<int>(next > k ? next - k : 0), lanes);
      const V here = load_first(z + k, lanes);
      const V dy = i + 1 < a.height ? sub(load_first(z + row + k, lanes), here) : zero();
      const V above = i > 0 ? sub(here, load_first(z - row + k, lanes)) : zero();
      const V dx = sub(load_lanes(z + next + k, has_next), load_lanes(z + k, has_next));
      const V before = sub(load_lanes(z + k, has_last), load_lanes(z - next + k, has_last));
      acc = fma(dy, dy, fma(dx, dx, acc));
      store_first(grad + k, fma(add(sub(above, dy), sub(before, dx)), scale, load_first(grad + k, lanes)), lanes);
    }
    total += static_cast<double>(sum(acc));
  }
  return total * static_cast<double>(a.weight);
}

enum class Exponent { kRoots, kOther };  // β = 1

// With dy, dx the differences to the next row and column (0 over the border) and s = dy² + dx² (+ 1e-12 for β < 2):
// the value is Σ s^{β/2}; s^{β/2} has the gradient q·dy to z[i+1, j], q·dx to z[i, j+1] and −q·(dy + dx) to z[i, j],
// where q = β·s^{β/2−1}.
template <Exponent kExponent>
double total_variation_of(const TotalVariationArgs& a) {
  const int64_t row = static_cast<int64_t>(a.width) * a.channels, inner = row - a.channels;  // a next column exists
  const int64_t padded = row + a.channels;
  float* down = a.scratch;                // q·dy of this row
  float* above = a.scratch + padded;      // q·dy of the row above
  float* right = a.scratch + 2 * padded;  // q·dx of this row, after `channels` zeros
  for (int64_t k = 0; k < row; ++k) above[k] = 0.0f;
  for (int64_t k = 0; k < a.channels; ++k) right[k] = 0.0f;
  const V epsilon = set1(a.beta < 2.0f ? 1e-12f : 0.0f), scale = set1(a.weight * a.beta);
  double total = 0.0;
  for (int64_t i = 0; i < a.height; ++i) {
    const float* z = a.z + i * row;
    const bool last_row = i + 1 == a.height;
    V acc = zero();
    for (int64_t k = 0; k < row; k += kWidth) {
      const int lanes = row - k < kWidth ? static_cast<int>(row - k) : kWidth;
      const Lanes has_next = lanes_between(0, inner - k < kWidth ? static_cast<int>(inner - k) : kWidth);
      const V dy = last_row ? zero() : sub(load_first(z + row + k, lanes), load_first(z + k, lanes));
      const V dx = sub(load_lanes(z + a.channels + k, has_next), load_lanes(z + k, has_next));
      const V s = fma(dy, dy, fma(dx, dx, epsilon));
      const V factor = kExponent == Exponent::kRoots ? div(set1(1.0f), sqrt(s)) : power(s, a.beta * 0.5f - 1.0f);
      const V value = mul(s, factor), q = mul(factor, scale);
      // Lanes past the end hold s = epsilon: they are left out of the sum.
      acc = add(acc, lanes == kWidth ? value : first_of(value, lanes));
      store_first(down + k, mul(q, dy), lanes);
      store_first(right + a.channels + k, mul(q, dx), lanes);
    }
    total += static_cast<double>(sum(acc));
    float* grad = a.grad + i * row;
    for (int64_t k = 0; k < row; k += kWidth) {
      const int lanes = row - k < kWidth ? static_cast<int>(row - k) : kWidth;
      const V into = add(load_first(above + k, lanes), load_first(right + k, lanes));
      const V out = add(load_first(down + k, lanes), load_first(right + a.channels + k, lanes));
      store_first(grad + k, add(load_first(grad + k, lanes), sub(into, out)), lanes);
    }
    float* swap = above;
    above = down;
    down = swap;
  }
  return total * static_cast<double>(a.weight);
}

double total_variation(const TotalVariationArgs& a) {
  return a.beta == 2.0f   ? total_variation_of_squares(a)
         : a.beta == 1.0f ? total_variation_of<Exponent::kRoots>(a)
                          : total_variation_of<Exponent::kOther>(a);
}

FASTINV_INLINE V optimizer_step(const OptimizerArgs& a, int64_t i, int lanes) {
  const V z = load_first(a.z + i, lanes);
  const V g = load_first(a.grad + i, lanes);
  if (a.kind == OptimizerKind::kSgd) {
    if (a.momentum == 0.0f) return sub(z, mul(g, set1(a.step_size)));
    const V buffer = a.first_step ? g : fma(load_first(a.first + i, lanes), set1(a.momentum), g);
    store_first(a.first + i, buffer, lanes);
    return sub(z, mul(buffer, set1(a.step_size)));
  }
  const V m_before = load_first(a.first + i, lanes);
  const V m = fma(sub(g, m_before), set1(1.0f - a.beta1), m_before);
  const V v = fma(mul(g, g), set1(1.0f - a.beta2), mul(load_first(a.second + i, lanes), set1(a.beta2)));
  store_first(a.first + i, m, lanes);
  store_first(a.second + i, v, lanes);
  V scale = v;
  if (a.kind == OptimizerKind::kAmsgrad) {
    scale = max(load_first(a.largest + i, lanes), v);
    store_first(a.largest + i, scale, lanes);
  }
  const V denominator = fma(sqrt(scale), set1(a.root_scale), set1(a.eps));
  return sub(z, div(mul(m, set1(a.step_size)), denominator));
}

void optimizer(const OptimizerArgs& a) {
  for (int64_t i = 0; i < a.size; i += kWidth) {
    const int lanes = a.size - i < kWidth ? static_cast<int>(a.size - i) : kWidth;
    V z = optimizer_step(a, i, lanes);
    if (a.low) z = min(max(z, load_first(a.low + i, lanes)), load_first(a.high + i, lanes));
    store_first(a.z + i, z, lanes);
  }
}

// In float64, in as many sums side by side as the compiler puts into vectors.
double dot(const float* a, const float* b, int64_t size) {
  constexpr int64_t kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    for (int64_t k = 0; k < kSums; ++k) sums[k] += static_cast<double>(a[i + k]) * static_cast<double>(b[i + k]);
  }
  double total = 0.0;
  for (; i < size; ++i) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (const double sum : sums) total += sum;
  return total;
}

void add_scaled(float scale, const float* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kWidth) {
    const int lanes = size - i < kWidth ? static_cast<int>(size - i) : kWidth;
    store_first(to + i, fma(load_first(from + i, lanes), set1(scale), load_first(to + i, lanes)), lanes);
  }
}
