// The same block on the host, where each of its threads is a turn of a loop: for tests without a GPU.
#include "descent.h"

namespace fastinv {

bool fits(const Descent& descent) {
  return with_tile(descent, [](auto) {});
}

void descend_on_host(const Descent& descent) {
  with_tile(descent, [&descent](auto tile) {
    using T = decltype(tile);
    for (int n = 0; n < descent.images; ++n) {
      HostBlock block(n, threads_of<T>(descent), shared_floats<T>(descent));
      descend<T>(descent, block);
    }
  });
}

}  // namespace fastinv
