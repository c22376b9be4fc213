#include <algorithm>

#include "check.h"
#include "run.h"

namespace fastinv {
namespace {

extern __shared__ __align__(1024) unsigned char tail_memory[];

template <class Type, bool kChannelsLast>
__global__ void __launch_bounds__(tail::kThreads, 1) tail_kernel(const __grid_constant__ Tail p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // Hopper's tensor cores, which no other GPU has
  DeviceThread self;
  run_tail<Type, kChannelsLast>(p, self, tail_memory, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
#endif
}

}  // namespace

void launch_tail(const Tail& p, int device, uintptr_t stream) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "the GPU says nothing of itself");
  with_type(p, [&](auto type, auto channels_last) {
    const auto kernel = tail_kernel<decltype(type), decltype(channels_last)::value>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tail::kShared),
          "no room for the weights on chip");
    kernel<<<static_cast<unsigned>(std::min(processors, (p.images + tail::kTeams - 1) / tail::kTeams)), tail::kThreads,
             tail::kShared, reinterpret_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "the last layers cannot be launched");
  });
}

}  // namespace fastinv
