// The same block on the host, where each of its threads is a turn of a loop: for tests without a GPU.
#include "run.h"

namespace fastinv {

template <class Problem>
void descend_on_host(const Descent& descent, const Problem& problem) {
  with_edge(descent, problem, [&descent](const auto& edge) {
    using Edge = std::decay_t<decltype(edge)>;
    for (int n = 0; n < descent.images; ++n) {
      HostBlock block(n, threads_of<Edge>(descent), shared_floats(descent, edge));
      descend(descent, edge, block);
    }
  });
}

template void descend_on_host(const Descent&, const QuadraticForm&);
template void descend_on_host(const Descent&, const PooledLayers&);

}  // namespace fastinv
