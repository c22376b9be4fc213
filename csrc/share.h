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

// Whether so many units of work, one to a thread at a time, would leave too many threads idle in the end: then all of
// them had better share each unit.
inline bool leaves_idle(int64_t units, int64_t threads) {
  const int64_t rounds = (units + threads - 1) / threads;
  return rounds <= 4 && 10 * units < 9 * rounds * threads;
}

}  // namespace fastinv
