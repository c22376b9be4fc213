// A block of floats on a cache line boundary.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace fastinv {

constexpr int64_t kLineFloats = 16;  // 64 bytes

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : Buffer(size, kLineFloats * sizeof(float)) { clear(round_up(size, kLineFloats)); }

  // Memory that should stay in L2, or is read again and again. Where it is large, on huge pages: 4 KiB ones lie
  // anywhere, and when too many of them fall into the same sets they push each other out (two threads over one at
  // ReLU22: 1.94 for 1.87, medians of four processes), and their addresses must be looked up more often.
  static Buffer for_work(int64_t size) {
#if defined(__linux__)
    constexpr int64_t kHuge = 2 * 1024 * 1024 / sizeof(float), kLarge = kHuge / 8;
    if (size >= kLarge) {
      Buffer buffer(round_up(size, kHuge), kHuge * sizeof(float));
      madvise(buffer.data_, static_cast<size_t>(buffer.size_) * sizeof(float), MADV_HUGEPAGE);  // it may say no
      buffer.clear(size);
      return buffer;
    }
#endif
    return Buffer(size);
  }
  Buffer(Buffer&& other) noexcept : size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  float* data() { return data_; }
  const float* data() const { return data_; }
  int64_t size() const { return size_; }
  float& operator[](int64_t i) { return data_[i]; }

 private:
  Buffer(int64_t size, size_t alignment) : size_(size) {
    const size_t bytes = static_cast<size_t>(round_up(size, kLineFloats)) * sizeof(float);
    if (bytes == 0) return;
    data_ = static_cast<float*>(std::aligned_alloc(alignment, bytes));
    if (!data_) throw std::bad_alloc();
  }
  void clear(int64_t size) {
    if (size > 0) std::memset(data_, 0, static_cast<size_t>(size) * sizeof(float));
  }

  int64_t size_ = 0;
  float* data_ = nullptr;
};

}  // namespace fastinv
