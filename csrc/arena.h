// Memory for values that live for a while each: those whose lives do not overlap share it.
#pragma once

#include <cstdint>
#include <vector>

namespace fastinv {

class Arena {
 public:
  // The lowest offset where `size` floats fit from step `begin` to step `end`, both included.
  int64_t place(int64_t size, int64_t begin, int64_t end);
  int64_t size() const { return size_; }

 private:
  struct Stretch {
    int64_t offset, size, begin, end;
  };
  std::vector<Stretch> stretches_;  // by offset
  int64_t size_ = 0;
};

}  // namespace fastinv
