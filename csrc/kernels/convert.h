// Between the types of features and images at the public door and float32.
#pragma once

bool finite(const float* in, int64_t size) {
  constexpr int kSums = 4;  // additions take three or four cycles: with fewer in flight they would be the limit
  V sums[kSums] = {zero(), zero(), zero(), zero()};
  const auto check = [](V total, V x) { return add(total, sub(x, x)); };  // x − x is 0, or NaN
  int64_t i = 0;
  for (; i + kSums * kWidth <= size; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) sums[k] = check(sums[k], load(in + i + k * kWidth));
  }
  for (; i + kWidth <= size; i += kWidth) sums[0] = check(sums[0], load(in + i));
  if (i < size) sums[1] = check(sums[1], load_first(in + i, static_cast<int>(size - i)));
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) == 0.0f;
}

// Calls convert(in, out) on whole vectors, the last of them through memory of its own.
template <class In, class Out, class Convert>
FASTINV_INLINE void convert_all(const In* in, Out* out, int64_t size, Convert convert) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) convert(in + i, out + i);
  if (i == size) return;
  In from[kWidth] = {};
  Out to[kWidth];
  memcpy(from, in + i, static_cast<size_t>(size - i) * sizeof(In));
  convert(from, to);
  memcpy(out + i, to, static_cast<size_t>(size - i) * sizeof(Out));
}

void widen(const WidenArgs& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: memcpy(a.out, a.in, static_cast<size_t>(a.size) * sizeof(float)); return;
    case Dtype::kFloat16:
      return convert_all(static_cast<const uint16_t*>(a.in), a.out, a.size,
                         [](const uint16_t* in, float* out) { store(out, load_half(in)); });
    case Dtype::kBfloat16:
      return convert_all(static_cast<const uint16_t*>(a.in), a.out, a.size,
                         [](const uint16_t* in, float* out) { store(out, load_bfloat16(in)); });
    case Dtype::kUint8:
      return convert_all(static_cast<const uint8_t*>(a.in), a.out, a.size, [&a](const uint8_t* in, float* out) {
        store(out, mul(sub(load_bytes(in), set1(a.zero_point)), set1(a.scale)));
      });
    case Dtype::kInt8:
      return convert_all(static_cast<const int8_t*>(a.in), a.out, a.size, [&a](const int8_t* in, float* out) {
        store(out, mul(sub(load_bytes(in), set1(a.zero_point)), set1(a.scale)));
      });
  }
}

// round(255 · x), cut to a byte; NaN becomes 0, which is what max makes of it.
void to_bytes(const float* in, uint8_t* out, int64_t size) {
  convert_all(in, out, size, [](const float* from, uint8_t* to) {
    store_bytes(to, min(max(mul(load(from), set1(255.0f)), zero()), set1(255.0f)));
  });
}

// The same where `in` comes from memory, and `out` is to stay in the cache. A thread of a Zen 5 read 18 GB/s so; with
// vectors that end where lines of the cache do 26, and with lines asked for ahead 39.
template <class Out, class Convert>
FASTINV_INLINE void convert_from_memory(const float* in, Out* out, int64_t size, Convert convert) {
  constexpr int64_t kLine = 64 / sizeof(float), kAhead = 8192 / sizeof(float);
  const int64_t before = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(in) & 63) / sizeof(float));
  int64_t i = before < size ? before : size;
  convert_all(in, out, i, convert);
  for (; i + kLine <= size; i += kLine) {
    __builtin_prefetch(in + i + kAhead);
#pragma GCC unroll 4
    for (int64_t k = i; k < i + kLine; k += kWidth) convert(in + k, out + k);
  }
  convert_all(in + i, out + i, size - i, convert);
}

// memcpy may write past the cache where pieces are large: from 1 MiB on it moved 40 GB/s (glibc, two threads of a Zen
// 5), this 49.
void bring(const uint8_t* in, uint8_t* out, int64_t size) {
  const int64_t rest = size % 4, whole = size - rest;
  convert_from_memory(reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), whole / 4,
                      [](const float* from, float* to) { store(to, load(from)); });
  memcpy(out + whole, in + whole, static_cast<size_t>(rest));
}

// Rounded as PyTorch does.
void bring_as_bfloat16(const float* in, uint16_t* out, int64_t size) {
  convert_from_memory(in, out, size, [](const float* from, uint16_t* to) { store_bfloat16(to, load(from)); });
}
