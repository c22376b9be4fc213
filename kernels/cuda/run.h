// What `module.cpp` binds, for a problem that is a `QuadraticForm`, a `BandedForm` or `PooledLayers`.
#pragma once

#include "banded_edges.h"
#include "layers.h"
#include "planar.h"
#include "pooled.h"
#include "quadratic.h"
#include "small_tail.h"

namespace fastinv {

// Whether there is a kernel for it.
template <class Problem>
bool fits(const Descent& descent, const Problem& problem) {
  return with_edge(descent, problem, [](const auto&) {});
}

// For memory of the host; `backward`: threads in another order, memory with other contents, the same results.
template <class Problem>
void descend_on_host(const Descent& descent, const Problem& problem, bool backward);

// For memory of this device; returns before it is done. Throws std::runtime_error.
template <class Problem>
void launch_descend(const Descent& descent, const Problem& problem, int device, uintptr_t stream);

// The same of layers, a `Tail`, a `WindowLayer`, a `HalvedLayer`, a `SmallTail` or a `PlanarLayer`.
template <class Params>
void layers_on_host(const Params& p, bool backward);
template <>
void layers_on_host(const SmallTail& p, bool backward);
template <>
void layers_on_host(const PlanarLayer& p, bool backward);
template <class Params>
void launch_layers(const Params& p, int device, uintptr_t stream);
template <>
void launch_layers(const SmallTail& p, int device, uintptr_t stream);
template <>
void launch_layers(const PlanarLayer& p, int device, uintptr_t stream);

// Throws std::runtime_error where kernels cannot run on this device, as its driver is too old for them.
void check_device(int device);

}  // namespace fastinv
