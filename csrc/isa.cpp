#include "isa.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

namespace fastinv {

#ifdef FASTINV_HAS_avx512
extern const Kernels kernels_avx512;
#endif
#ifdef FASTINV_HAS_avx2
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

const std::vector<Isa>& isas() {
  // __builtin_cpu_supports asks the operating system too (XGETBV), not only the processor.
  static const std::vector<Isa> list = {
#ifdef FASTINV_HAS_avx512
      {&kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#endif
#ifdef FASTINV_HAS_avx2
      {&kernels_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {&kernels_portable, true},
  };
  return list;
}

bool has_bfloat16(const Kernels& kernels) {
#ifdef FASTINV_HAS_avx512
  return kernels.bfloat16_product && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

namespace {

// The state of tiles is large: a process asks Linux for it, once for all its threads, and may be refused where a thread
// has too small a stack for signals.
bool may_use_tiles() {
#if defined(FASTINV_HAS_avx512) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmxBfloat16 = 1u << 22, kAmxTile = 1u << 24;
  static const bool may = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBfloat16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return may;
#else
  return false;
#endif
}

}  // namespace

bool has_tiles(const Kernels& kernels) {
  if (kernels.amx == nullptr) return false;
  return &kernels == &kernels_portable || (has_bfloat16(kernels) && may_use_tiles());
}

const Kernels& kernels_for(const std::string& name) {
  std::string runnable;
  for (const Isa& isa : isas()) {
    if (!isa.runnable) continue;
    if (name.empty() || name == isa.kernels->isa) return *isa.kernels;
    runnable += (runnable.empty() ? "" : ", ") + std::string(isa.kernels->isa);
  }
  for (const Isa& isa : isas()) {
    if (name == isa.kernels->isa) {
      throw std::invalid_argument("instruction set '" + name + "' is not available on this machine; it can run " +
                                  runnable);
    }
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; this machine can run " + runnable);
}

}  // namespace fastinv
