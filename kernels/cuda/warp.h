// A warp that multiplies matrices on tensor cores, from Ampere's on: on the GPU and as its stand-in on the host, where
// its lanes are a loop. What a lane keeps is a `PerLane`, or is told by a function of the lane.
//
// Of a left factor [16, 16] a lane has the pairs of columns 2·(lane % 4) + 8·j in rows lane / 4 + 8·i at 2·j + i; of a
// right factor [16, 8] the pairs of rows 2·(lane % 4) + 8·j in column lane / 4 at j; of sums [16, 8] row lane / 4 +
// 8·i, column 2·(lane % 4) + e at 2·i + e (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once

#include "halves.h"

namespace fastinv {

constexpr int kWarp = 32;

// The same value. What depends on it is computed where it is used: else a compiler computes what is the same in all
// turns of a long loop before it, and has not the registers to keep it.
template <class Int>
FASTINV_BLOCK Int in_place(Int value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

struct alignas(16) LeftFactor {
  uint32_t at[4];
};
struct RightFactor {
  uint32_t at[2];

  // Makes it here, before whatever is read from memory after: a compiler may make it last, of registers that it has to
  // copy before loads take their place, and then waits for these loads.
  FASTINV_BLOCK void make_here() {
#ifdef __CUDACC__
    asm volatile("" : "+r"(at[0]), "+r"(at[1]) : : "memory");
#endif
  }
};
// The high and the low part of each number (`Halved`), read at once.
struct alignas(16) SplitRight {
  RightFactor high, low;
};
struct Sums {
  float at[4];
};

#ifdef __CUDACC__
template <class T>
class PerLane {
 public:
  __device__ T& operator()(int) { return own_; }

 private:
  T own_;
};

class DeviceWarp {
 public:
  __device__ DeviceWarp() : thread_(in_place(threadIdx.x)) {}
  __device__ int index() const { return static_cast<int>(thread_ / kWarp); }
  // The lane's number in the block.
  __device__ int thread(int) const { return static_cast<int>(thread_); }

  template <class F>
  __device__ void each(F&& work) const {
    work(lane());
  }

  // Four matrices [8, 8] of float16 from shared memory, a word of each: lane l tells where row l % 8 of matrix l / 8
  // lies, 16 bytes from a multiple of as many on. `to(lane)` is where the words go. Of a left factor the second matrix
  // is below the first, the third to its right; or they are the upper and lower halves of two right factors, a column a
  // row.
  template <class Row, class To>
  __device__ void load(Row&& row, To&& to) const {
    const int lane = this->lane();
    uint32_t (&a)[4] = to(lane).at;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row(lane)))));
  }

  // sums += left · right, of either type.
#define FASTINV_MULTIPLY(Type, kind)                                                                              \
  template <class S, class L, class R>                                                                            \
  __device__ void multiply(Type, S&& sums, L&& left, R&& right) const {                                           \
    const int lane = this->lane();                                                                                \
    float* d = sums(lane).at;                                                                                     \
    const auto& l = left(lane); /* which may be made there and then, and so are kept until they have been used */ \
    const auto& r = right(lane);                                                                                  \
    const uint32_t *a = l.at, *b = r.at;                                                                          \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." kind                                                    \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
  }
  FASTINV_MULTIPLY(Float16, "f16.f16")
  FASTINV_MULTIPLY(Bfloat16, "bf16.bf16")

  // The largest of the lanes' values, none of which is below 0.
  template <class F>
  __device__ float largest(F&& value) const {
    const int lane = this->lane();
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(value(lane))));
  }

 private:
  __device__ int lane() const { return static_cast<int>(thread_ % kWarp); }

  unsigned thread_;
};

#else
template <class T>
class PerLane {
 public:
  T& operator()(int lane) { return all_[lane]; }

 private:
  T all_[kWarp]{};
};

class HostWarp {
 public:
  explicit HostWarp(int index) : index_(index) {}
  int index() const { return index_; }
  int thread(int lane) const { return index_ * kWarp + lane; }

  template <class F>
  void each(F&& work) const {
    for (int lane = 0; lane < kWarp; ++lane) work(lane);
  }

  template <class Row, class To>
  void load(Row&& row, To&& to) const {
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* words = reinterpret_cast<const uint32_t*>(row(lane));
      for (int i = 0; i < 4; ++i) to(lane % 8 * 4 + i).at[lane / 8] = words[i];
    }
  }

  template <class Type, class S, class L, class R>
  void multiply(Type type, S&& sums, L&& left, R&& right) const {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int pair = lane % 4 * 2, other = lane / 4;
      for (int i = 0; i < 4; ++i) {
        float* at = &a[other + i % 2 * 8][pair + i / 2 * 8];
        unpack(type, left(lane).at[i], at[0], at[1]);
      }
      for (int i = 0; i < 2; ++i) unpack(type, right(lane).at[i], b[pair + i * 8][other], b[pair + i * 8 + 1][other]);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = sums(lane).at[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        sums(lane).at[i] = sum;
      }
    }
  }

  template <class F>
  float largest(F&& value) const {
    float result = 0.0f;
    for (int lane = 0; lane < kWarp; ++lane) result = value(lane) > result ? value(lane) : result;
    return result;
  }

 private:
  int index_;
};
#endif

// sums + cross += left · right of numbers in two parts of float16; what both lows make is left out. A product waits for
// the one before it in its sums: those with low parts have sums of their own.
template <class Warp, class S, class C, class L, class R>
FASTINV_BLOCK void multiply_split(const Warp& warp, S&& sums, C&& cross, L&& high, L&& low, R&& right) {
  warp.multiply(Float16{}, sums, high, [&](int lane) { return right(lane).high; });
  warp.multiply(Float16{}, cross, high, [&](int lane) { return right(lane).low; });
  warp.multiply(Float16{}, cross, low, [&](int lane) { return right(lane).high; });
}

// The same in one.
template <class Warp, class S, class L, class R>
FASTINV_BLOCK void multiply_split(const Warp& warp, S&& sums, L&& high, L&& low, R&& right) {
  multiply_split(warp, sums, sums, high, low, right);
}

// sums += cross.
template <class Warp>
FASTINV_BLOCK void add(const Warp& warp, PerLane<Sums>& sums, PerLane<Sums>& cross) {
  warp.each([&](int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums(lane).at[i] += cross(lane).at[i];
  });
}

}  // namespace fastinv
