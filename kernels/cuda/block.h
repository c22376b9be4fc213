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
// Threads are a loop, memory is the host's.
class HostBlock {
 public:
  HostBlock(int index, int threads, int64_t shared_floats)
      : index_(index), threads_(threads), shared_(static_cast<size_t>((shared_floats + 3) / 4)) {}

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
    for (int thread = 0; thread < threads_; ++thread) work(thread);
  }

  template <class F>
  void each_warp(F&& work) const {
    for (int index = 0; index < threads_ / kWarp; ++index) work(HostWarp(index));
  }

 private:
  int index_, threads_;
  std::vector<Four> shared_;
};
#endif

}  // namespace fastinv
