// The same block on the host, where each of its threads is a turn of a loop: for tests without a GPU.
#include "run.h"

namespace fastinv {

template <class Problem>
void descend_on_host(const Descent& descent, const Problem& problem, bool backward) {
  with_edge(descent, problem, [&](const auto& edge) {
    const Grid grid = grid_of(descent, edge);
    for (int index = 0; index < grid.blocks; ++index) {
      HostBlock block(index, grid.threads, grid.floats, backward);
      descend(descent, edge, block);
    }
  });
}

template <class Params>
void layers_on_host(const Params& p, bool backward) {
  constexpr int kBlocks = 2;
  struct alignas(1024) Kilobyte {
    unsigned char at[1024];
  };
  with_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    using Worker = typename Kind::template Worker<HostThread>;
    for (int block = 0; block < kBlocks; ++block) {
      std::vector<Kilobyte> shared(static_cast<size_t>(Worker::shared(p) + 1023) / 1024);
      if (backward) std::memset(shared.data(), 0xff, shared.size() * sizeof(Kilobyte));
      HostThreads threads(Kind::kThreads, backward);
      threads.run([&](int index) {
        HostThread self(threads, index);
        Worker(p, self, shared[0].at).run(block, kBlocks);
      });
    }
  });
}

template <>
void layers_on_host(const SmallTail& p, bool backward) {
  small::on_host(p, backward);
}

template <>
void layers_on_host(const PlanarLayer& p, bool backward) {
  planar::on_host(p, backward);
}

template void descend_on_host(const Descent&, const QuadraticForm&, bool);
template void descend_on_host(const Descent&, const BandedForm&, bool);
template void descend_on_host(const Descent&, const PooledLayers&, bool);
template void layers_on_host(const Tail&, bool);
template void layers_on_host(const WindowLayer&, bool);
template void layers_on_host(const HalvedLayer&, bool);

}  // namespace fastinv
