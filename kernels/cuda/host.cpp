// The same block on the host, where each of its threads is a turn of a loop: for tests without a GPU.
#include "run.h"

namespace fastinv {

template <class Problem>
void descend_on_host(const Descent& descent, const Problem& problem) {
  with_edge(descent, problem, [&descent](const auto& edge) {
    using Edge = std::decay_t<decltype(edge)>;
    for (int n = 0; n < blocks_of<Edge>(descent); ++n) {
      HostBlock block(n, threads_of<Edge>(descent), shared_floats(descent, edge));
      descend(descent, edge, block);
    }
  });
}

void tail_on_host(const Tail& tail) {
  constexpr int kBlocks = 2;
  struct alignas(1024) Kilobyte {
    unsigned char at[1024];
  };
  with_type(tail, [&](auto type, auto channels_last) {
    for (int block = 0; block < kBlocks; ++block) {
      std::vector<Kilobyte> shared((tail::kShared + 1023) / 1024);
      HostThreads threads(tail::kThreads);
      threads.run([&](int index) {
        HostThread self(threads, index);
        run_tail<decltype(type), decltype(channels_last)::value>(tail, self, shared[0].at, block, kBlocks);
      });
    }
  });
}

template void descend_on_host(const Descent&, const QuadraticForm&);
template void descend_on_host(const Descent&, const PooledLayers&);

}  // namespace fastinv
