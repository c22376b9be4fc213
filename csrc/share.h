// One worker's part of work that is cut into equal parts.
#pragma once

#include <cstdint>

namespace fastinv {

struct Share {
  int64_t index = 0, count = 1;

  // Of n units, this part has those from begin(n) to end(n).
  int64_t begin(int64_t n) const { return n * index / count; }
  int64_t end(int64_t n) const { return n * (index + 1) / count; }
};

}  // namespace fastinv
