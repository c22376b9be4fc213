#include "check.h"
#include "run.h"

namespace fastinv {
namespace {

extern __shared__ Four shared_memory[];

template <class Edge>
__global__ void __launch_bounds__(Edge::kMostThreads, Edge::kBlocks)
    descend_kernel(const Descent descent, const Edge edge) {
  DeviceBlock block(shared_memory->at);
  descend(descent, edge, block);
}

}  // namespace

template <class Problem>
void launch_descend(const Descent& descent, const Problem& problem, int device, uintptr_t stream) {
  check(cudaSetDevice(device), "the GPU cannot be used");
  with_edge(descent, problem, [&](const auto& edge) {
    using Edge = std::decay_t<decltype(edge)>;
    const Grid grid = grid_of(descent, edge);
    const int bytes = grid.floats * static_cast<int>(sizeof(float));
    // All there is, not `bytes`: threads that launch the kernel for other sizes meanwhile would lower it.
    check(cudaFuncSetAttribute(descend_kernel<Edge>, cudaFuncAttributeMaxDynamicSharedMemorySize, descent.room),
          "no room for an image on chip");
    descend_kernel<Edge><<<static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads),
                           static_cast<size_t>(bytes), reinterpret_cast<cudaStream_t>(stream)>>>(descent, edge);
    check(cudaGetLastError(), "the steps cannot be launched");
  });
}

template void launch_descend(const Descent&, const QuadraticForm&, int, uintptr_t);
template void launch_descend(const Descent&, const BandedForm&, int, uintptr_t);
template void launch_descend(const Descent&, const PooledLayers&, int, uintptr_t);

}  // namespace fastinv
