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

// Calls body(item, first, last) for this share of the units of all items, which have as many each, item by item.
template <class Body>
void for_each_stretch(int64_t items, int64_t units, Share share, const Body& body) {
  const int64_t end = share.end(items * units);
  for (int64_t at = share.begin(items * units); at < end;) {
    const int64_t first = at % units, last = first + end - at < units ? first + end - at : units;
    body(at / units, first, last);
    at += last - first;
  }
}

// Whether so many units of work, one to a thread at a time, would leave too many threads idle in the end: then all of
// them had better share each unit.
inline bool leaves_idle(int64_t units, int64_t threads) {
  const int64_t rounds = (units + threads - 1) / threads;
  return rounds <= 4 && 10 * units < 9 * rounds * threads;
}

}  // namespace fastinv
