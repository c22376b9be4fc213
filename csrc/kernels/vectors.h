// Loops over memory, vector by vector.
#pragma once

// Calls body(i, lanes) for each vector of so many elements.
template <class Body>
FASTINV_INLINE void for_vectors(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
  if (i < size) body(i, static_cast<int>(size - i));
}
