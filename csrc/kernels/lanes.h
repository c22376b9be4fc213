// Whole vectors, and halves: what runs on either takes one of these, and says `typename L::Vector`.
#pragma once

struct Wide {
  using Vector = V;
  static constexpr int kLanes = kWidth;
  FASTINV_INLINE Vector zeros() { return zero(); }
  FASTINV_INLINE Vector get(const float* p) { return load(p); }
  FASTINV_INLINE Vector get_lanes(const float* p, Lanes lanes) { return load_lanes(p, lanes); }
  FASTINV_INLINE Vector all(float x) { return set1(x); }
  FASTINV_INLINE V widen(Vector v) { return v; }  // with zeros
  FASTINV_INLINE Vector cut(V v) { return v; }
  FASTINV_INLINE void put(float* p, Vector v) { store(p, v); }
  FASTINV_INLINE void put_first(float* p, Vector v, int n) { store_first(p, v, n); }
};

#ifdef FASTINV_FAST_HALVES
constexpr bool kFastHalves = true;
#else
constexpr bool kFastHalves = false;
struct Narrow : Wide {
  static constexpr int kLanes = kWidth / 2;
  FASTINV_INLINE Vector get(const float* p) { return load_low(p); }
  FASTINV_INLINE void put(float* p, Vector v) { store_low(p, v); }
};
#endif
