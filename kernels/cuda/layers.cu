#include <algorithm>

#include "check.h"
#include "run.h"

namespace fastinv {
namespace {

extern __shared__ __align__(1024) unsigned char layer_memory[];

template <class Kind, class Params>
__global__ void __launch_bounds__(Kind::kThreads, 1) layer_kernel(const __grid_constant__ Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // Hopper's tensor cores, which no other GPU has
  DeviceThread self;
  typename Kind::template Worker<DeviceThread>(p, self, layer_memory)
      .run(static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
#endif
}

__global__ void __launch_bounds__(small::kThreads, 2) small_kernel(const __grid_constant__ SmallTail p) {
  DeviceBlock block(reinterpret_cast<float*>(layer_memory));
  small::Worker<DeviceBlock>(p, block).run();
}

template <class Type>
__global__ void __launch_bounds__(planar::kThreads, 2) planar_kernel(const __grid_constant__ PlanarLayer p) {
  DeviceBlock block(reinterpret_cast<float*>(layer_memory));
  planar::Worker<Type, DeviceBlock>(p, block, static_cast<int>(gridDim.x)).run();
}

int processors_of(int device) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "the GPU says nothing of itself");
  return processors;
}

}  // namespace

template <class Params>
void launch_layers(const Params& p, int device, uintptr_t stream) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  const int processors = processors_of(device);
  with_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    const int shared = Kind::template Worker<DeviceThread>::shared(p);
    const auto kernel = layer_kernel<Kind, Params>;
    // All there is, not `shared`: threads that launch the kernel for other sizes meanwhile would lower it.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared),
          "no room for the weights on chip");
    const int blocks = static_cast<int>(std::min<int64_t>(processors, int64_t{p.images} * parts(p)));
    kernel<<<static_cast<unsigned>(blocks), Kind::kThreads, static_cast<size_t>(shared),
             reinterpret_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "the layers cannot be launched");
  });
}

template <>
void launch_layers(const SmallTail& p, int device, uintptr_t stream) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  const int shared = small::kFloats * static_cast<int>(sizeof(float));
  check(cudaFuncSetAttribute(small_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "no room for images on chip");
  small_kernel<<<static_cast<unsigned>(small::blocks(p)), small::kThreads, static_cast<size_t>(shared),
                 reinterpret_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError(), "the layers cannot be launched");
}

template <>
void launch_layers(const PlanarLayer& p, int device, uintptr_t stream) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  const auto kernel = p.float16 ? planar_kernel<Float16> : planar_kernel<Bfloat16>;
  // All there is, as above.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.room), "no room on chip");
  const int blocks = std::min(p.images, planar::blocks_together(p) * processors_of(device));
  kernel<<<static_cast<unsigned>(blocks), planar::kThreads, sizeof(float) * static_cast<size_t>(planar::floats(p)),
           reinterpret_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError(), "the layer cannot be launched");
}

void check_device(int device) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, small_kernel), "the kernels cannot be loaded");
}

template void launch_layers(const Tail&, int, uintptr_t);
template void launch_layers(const WindowLayer&, int, uintptr_t);
template void launch_layers(const HalvedLayer&, int, uintptr_t);

}  // namespace fastinv
