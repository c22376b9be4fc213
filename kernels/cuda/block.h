// One thread block, on the GPU and as its stand-in on the host, so that what a block does is written once and can be
// tested where there is no GPU. An algorithm for a block is a sequence of `each`, with a barrier after every one; what
// a thread keeps from one to the next is a `PerThread`. `Shared` memory belongs to all.
#pragma once

#include <cmath>
#include <vector>

#include "warp.h"

namespace fastinv {

// Four floats that are read at once.
struct alignas(16) Four {
  float at[4];
};

#ifdef __CUDACC__
class DeviceBlock {
 public:
  template <class T>
  class PerThread {
   public:
    __device__ explicit PerThread(const DeviceBlock&) {}
    __device__ T& operator[](int) { return own_; }

   private:
    T own_;
  };

  __device__ explicit DeviceBlock(float* shared) : shared_(shared) {}
  __device__ int index() const { return static_cast<int>(blockIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ float* shared() const { return shared_; }

  template <class F>
  __device__ void each(F&& work) const {
    work(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // The same of its warps, each a `DeviceWarp`.
  template <class F>
  __device__ void each_warp(F&& work) const {
    work(DeviceWarp());
    __syncthreads();
  }

 private:
  float* shared_;
};

#else
// Threads are a loop, memory is the host's. What a result must not depend on: with `backward` the loop begins with the
// last thread, and memory holds NaN at first.
class HostBlock {
 public:
  HostBlock(int index, int threads, int64_t shared_floats, bool backward = false)
      : index_(index), threads_(threads), backward_(backward), shared_(static_cast<size_t>((shared_floats + 3) / 4)) {
    if (backward) std::memset(shared_.data(), 0xff, shared_.size() * sizeof(Four));
  }

  template <class T>
  class PerThread {
   public:
    explicit PerThread(const HostBlock& block) : all_(static_cast<size_t>(block.threads())) {}
    T& operator[](int thread) { return all_[static_cast<size_t>(thread)]; }

   private:
    std::vector<T> all_;
  };

  int index() const { return index_; }
  int threads() const { return threads_; }
  float* shared() { return shared_.data()->at; }

  template <class F>
  void each(F&& work) const {
    for (int i = 0; i < threads_; ++i) work(backward_ ? threads_ - 1 - i : i);
  }

  template <class F>
  void each_warp(F&& work) const {
    const int warps = threads_ / kWarp;
    for (int i = 0; i < warps; ++i) work(HostWarp(backward_ ? warps - 1 - i : i));
  }

 private:
  int index_, threads_;
  bool backward_;
  std::vector<Four> shared_;
};
#endif

}  // namespace fastinv
