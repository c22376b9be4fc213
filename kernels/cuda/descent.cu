#include <stdexcept>
#include <string>

#include "descent.h"

namespace fastinv {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

extern __shared__ Four shared_memory[];

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1) descend_kernel(const __grid_constant__ Descent descent) {
  DeviceBlock block(shared_memory->at);
  descend<T>(descent, block);
}

}  // namespace

void launch_descend(const Descent& descent, int device, uintptr_t stream) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  with_tile(descent, [&](auto tile) {
    using T = decltype(tile);
    const int bytes = shared_floats<T>(descent) * static_cast<int>(sizeof(float));
    check(cudaFuncSetAttribute(descend_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "no room for an image on chip");
    descend_kernel<T><<<static_cast<unsigned>(descent.images), static_cast<unsigned>(threads_of<T>(descent)),
                        static_cast<size_t>(bytes), reinterpret_cast<cudaStream_t>(stream)>>>(descent);
    check(cudaGetLastError(), "the steps cannot be launched");
  });
}

}  // namespace fastinv
