// The instruction sets this build has kernels for, best first, and which of them this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastinv {

struct Isa {
  const Kernels* kernels;
  bool runnable;
};

const std::vector<Isa>& isas();

// The kernels of the named set, or of the best runnable one for "". Throws std::invalid_argument when the name is
// unknown or the machine lacks it; the message lists what there is.
const Kernels& kernels_for(const std::string& name);

// Whether this machine multiplies bfloat16 numbers in these kernels.
bool has_bfloat16(const Kernels& kernels);

// Whether these kernels can multiply tiles of them: on processors with AMX, by permission of the operating system; and
// in the portable ones, which do it one number at a time for the tests' sake.
bool has_tiles(const Kernels& kernels);

}  // namespace fastinv
