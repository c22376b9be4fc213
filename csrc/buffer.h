// A block of floats on a cache line boundary.
#pragma once

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
  explicit Buffer(int64_t size) : size_(size) {
    const size_t bytes = static_cast<size_t>(round_up(size, kLineFloats)) * sizeof(float);
    if (bytes == 0) return;
    data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
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
  int64_t size_ = 0;
  float* data_ = nullptr;
};

}  // namespace fastinv
