#include "arena.h"

#include <algorithm>

namespace fastinv {

int64_t Arena::place(int64_t size, int64_t begin, int64_t end) {
  int64_t at = 0;
  for (const Stretch& other : stretches_) {
    if (other.end < begin || end < other.begin) continue;
    if (at + size <= other.offset) break;
    at = std::max(at, other.offset + other.size);
  }
  const auto after = std::upper_bound(stretches_.begin(), stretches_.end(), at,
                                      [](int64_t offset, const Stretch& s) { return offset < s.offset; });
  stretches_.insert(after, {at, size, begin, end});
  size_ = std::max(size_, at + size);
  return at;
}

}  // namespace fastinv
