// A thread of a block that multiplies matrices on Hopper's tensor cores, on the GPU and as its stand-in on the host, so
// that what the threads do is written once and can be tested where there is no GPU.
//
// A warp has 16 rows of a product, a warpgroup of four 64. A fragment is what a lane has of them: of a left factor
// [16, 16] four registers of two values each, of sums [16, N] N / 2 floats, those of column 8·j + 2·(lane % 4) + e in
// row lane / 4 + 8·h at 4·j + 2·h + e (PTX ISA, "wgmma.mma_async").
#pragma once

#include "block.h"

#ifndef __CUDACC__
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>
#endif

namespace fastinv {

constexpr int kMostShared = 227 * 1024;  // bytes of a block on Hopper
constexpr int kTeam = 4 * kWarp;         // threads of a warpgroup

#ifdef __CUDACC__
// A right factor in shared memory, transposed: rows of 128 bytes, from a multiple of 1024 on, whose pieces of 16 lie in
// the order of their number xor the row's, modulo 8; and places in it, in rows at multiples of 32 bytes.
struct Right {
  uint64_t descriptor;  // PTX ISA, "Matrix descriptor format"; its low bits are an address in sixteens of bytes

  FASTINV_BLOCK explicit Right(const unsigned char* at)
      : descriptor((static_cast<uint64_t>(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4 | uint64_t{1} << 16 |
                   uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62) {}
  FASTINV_BLOCK Right operator+(int bytes) const {
    Right result = *this;
    result.descriptor += static_cast<uint64_t>(bytes >> 4);
    return result;
  }
};

// The largest of each half of two words, as unsigned numbers.
FASTINV_BLOCK inline uint32_t larger_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

class DeviceThread {
 public:
  __device__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ void sync() const { __syncthreads(); }
  // The threads of the warpgroup, which is number `group` of the block.
  __device__ void sync(int group) const {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(4 * kWarp) : "memory");
  }
  // Warpgroup `group` waits for its turn, which the one before it hands on.
  __device__ void wait_turn(int group) const {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 8), "n"(8 * kWarp) : "memory");
  }
  __device__ void hand_on(int group) const {
    asm volatile("bar.arrive %0, %1;" ::"r"(group + 8), "n"(8 * kWarp) : "memory");
  }
  __device__ float shuffle(float value, int lane) const { return __shfl_sync(0xffffffffu, value, lane); }
  __device__ uint32_t shuffle(uint32_t value, int lane) const { return __shfl_sync(0xffffffffu, value, lane); }
  // The largest of a warp's.
  __device__ uint32_t largest(uint32_t value) const { return __reduce_max_sync(0xffffffffu, value); }

  // 16 bytes of global memory, or zeros unless `there`, on their way to shared memory; after `wait_copies` those of
  // this thread have arrived.
  __device__ void copy(unsigned char* to, const unsigned char* from, bool there) const {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(from), "r"(there ? 16 : 0)
        : "memory");
  }
  __device__ void wait_copies() const { asm volatile("cp.async.wait_all;" ::: "memory"); }

  // What will be read from global memory is brought to the L2 cache.
  __device__ void ask_for(const unsigned char* address) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
  }

  // What was written to shared memory by threads is to be read by tensor cores, after the next `sync`.
  __device__ void publish() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // A fragment of a left factor: lane l says where row l % 16, columns 8·(l / 16) to 7 more, lies in shared memory.
  __device__ void load_fragment(const unsigned char* row, uint32_t (&a)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
  }

  // Products are asynchronous: those between `begin_products` and `end_products` are a group, and after
  // `wait_products<n>` all but the last n groups are done. `take_products` waits for all, and gives their sums: only
  // behind it may these be read. The compiler takes a product for done where it stands, and moves what needs nothing
  // but registers to before a wait that does not name them.
  __device__ void begin_products() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ void end_products() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int kGroups>
  __device__ void wait_products() const {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  }
  template <class... Sums>
  __device__ void take_products(Sums&... sums) const {
    wait_products<0>();
    (take(sums), ...);
  }

  // sums = a · Bᵀ, added to what they are where `keep`, for B [N, 16] as `Right` says.
#define FASTINV_PRODUCT(kind, n, registers, a0, a1, a2, a3, b_, keep_, ...)                                       \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " keep_ ", 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." kind \
               " {" registers "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_ ", p, 1, 1, 0; }"                        \
               : __VA_ARGS__                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(static_cast<int>(keep)))
#define FASTINV_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTINV_8(d, i) FASTINV_4(d, i), FASTINV_4(d, i + 4)
#define FASTINV_16(d, i) FASTINV_8(d, i), FASTINV_8(d, i + 8)
#define FASTINV_32(d, i) FASTINV_16(d, i), FASTINV_16(d, i + 16)
#define FASTINV_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTINV_R16 FASTINV_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTINV_R32 FASTINV_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTINV_PRODUCTS(Type, kind)                                                                      \
  __device__ void product(Type, float (&d)[32], const uint32_t (&a)[4], Right b, bool keep) const {       \
    FASTINV_PRODUCT(kind, "64", FASTINV_R32, "%32", "%33", "%34", "%35", "%36", "%37", FASTINV_32(d, 0)); \
  }                                                                                                       \
  __device__ void product(Type, float (&d)[16], const uint32_t (&a)[4], Right b, bool keep) const {       \
    FASTINV_PRODUCT(kind, "32", FASTINV_R16, "%16", "%17", "%18", "%19", "%20", "%21", FASTINV_16(d, 0)); \
  }                                                                                                       \
  __device__ void product(Type, float (&d)[8], const uint32_t (&a)[4], Right b, bool keep) const {        \
    FASTINV_PRODUCT(kind, "16", FASTINV_R8, "%8", "%9", "%10", "%11", "%12", "%13", FASTINV_8(d, 0));     \
  }
  FASTINV_PRODUCTS(Bfloat16, "bf16.bf16")
  FASTINV_PRODUCTS(Float16, "f16.f16")

 private:
  __device__ static void take(float& sum) { asm volatile("" : "+f"(sum)); }
  template <class Sums, int kCount>
  __device__ static void take(Sums (&sums)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) take(sums[i]);
  }
};

#else
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  const uint32_t low = (a & 0xffffu) > (b & 0xffffu) ? a : b, high = a >> 16 > b >> 16 ? a : b;
  return (low & 0xffffu) | (high & 0xffff0000u);
}

struct Right {
  const unsigned char* place;

  explicit Right(const unsigned char* at) : place(at) {}
  Right operator+(int bytes) const { return Right(place + bytes); }
};

// The threads of a block, each with a stack of its own, which take turns where they wait for each other. A warp runs as
// far as it can before the next one does, from the first on, or if `backward` from the last: what a result must not
// depend on.
class HostThreads {
 public:
  explicit HostThreads(int count, bool backward = false)
      : backward_(backward),
        threads_(static_cast<size_t>(count)),
        warps_(static_cast<size_t>(count / kWarp)),
        groups_(static_cast<size_t>(count / (4 * kWarp))),
        turns_(groups_.size() + 1) {}

  // Run work(thread) in all of them.
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    all_ = {static_cast<int>(threads_.size()), 0, 0};
    for (Barrier& warp : warps_) warp = {kWarp, 0, 0};
    for (Barrier& group : groups_) group = {4 * kWarp, 0, 0};
    for (Barrier& turn : turns_) turn = {8 * kWarp, 0, 0};
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      if (!thread.stack) thread.stack.reset(new char[kStack]);  // not filled with zeros, which took a tenth of all
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = &scheduler_;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&thread.context, reinterpret_cast<void (*)()>(&HostThreads::enter), 3,
                  static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), static_cast<unsigned>(i));
    }
    for (bool left = true; left;) {
      left = false;
      for (size_t i = 0; i < warps_.size(); ++i) left |= run_warp(backward_ ? warps_.size() - 1 - i : i);
    }
  }

  void sync() { wait(all_); }
  void sync_group() { wait(groups_[current_ / (4 * kWarp)]); }
  void sync_warp() { wait(warps_[current_ / kWarp]); }
  void wait_turn(int group) { wait(turns_[static_cast<size_t>(group)]); }
  void hand_on(int group) { arrive(turns_[static_cast<size_t>(group)]); }
  // What a thread shows to the others of its warp.
  Words& shown(int thread) { return threads_[static_cast<size_t>(thread)].shown; }

 private:
  static constexpr size_t kStack = 1 << 16;
  struct Barrier {
    int size, arrived, generation;
  };
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    const Barrier* waits_for = nullptr;
    int generation = 0;  // of that barrier, when it began to wait
    Words shown{};
  };

  static void enter(unsigned high, unsigned low, unsigned index) {
    auto* self = reinterpret_cast<HostThreads*>(uintptr_t{high} << 32 | low);
    (*self->work_)(static_cast<int>(index));
    self->threads_[index].done = true;
  }
  // Until none of its threads gets further; whether any is left.
  bool run_warp(size_t warp) {
    bool left = true;
    for (bool ran = true; ran && left;) {
      ran = left = false;
      for (size_t i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
        const Thread& thread = threads_[i];
        left |= !thread.done;
        if (thread.done || (thread.waits_for != nullptr && thread.waits_for->generation == thread.generation)) continue;
        ran = true;
        current_ = i;
        swapcontext(&scheduler_, &threads_[i].context);
      }
    }
    return left;
  }
  static void arrive(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
  }
  void wait(Barrier& barrier) {
    Thread& self = threads_[current_];
    self.waits_for = &barrier;
    self.generation = barrier.generation;
    arrive(barrier);
    if (barrier.generation == self.generation) swapcontext(&self.context, &scheduler_);
    self.waits_for = nullptr;
  }

  const bool backward_;
  const std::function<void(int)>* work_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Barrier> warps_, groups_, turns_;
  Barrier all_{};
  ucontext_t scheduler_{};
  size_t current_ = 0;
};

class HostThread {
 public:
  HostThread(HostThreads& all, int index) : all_(all), index_(index) {}
  int index() const { return index_; }
  void sync() const { all_.sync(); }
  void sync(int) const { all_.sync_group(); }
  void wait_turn(int group) const { all_.wait_turn(group); }
  void hand_on(int group) const { all_.hand_on(group); }
  void ask_for(const unsigned char*) const {}
  void publish() const {}
  void begin_products() const {}
  void end_products() const {}
  template <int kGroups>
  void wait_products() const {}
  template <class... Sums>
  void take_products(Sums&...) const {}

  float shuffle(float value, int lane) const { return as_float(shuffle(bits(value), lane)); }
  uint32_t shuffle(uint32_t value, int lane) const {
    return exchanged({{value, 0, 0, 0}}, [&](const auto& of) { return of(lane); }).at[0];
  }
  uint32_t largest(uint32_t value) const {
    return exchanged({{value, 0, 0, 0}},
                     [&](const auto& of) {
                       Words result = of(0);
                       for (int lane = 1; lane < kWarp; ++lane) result.at[0] = std::max(result.at[0], of(lane).at[0]);
                       return result;
                     })
        .at[0];
  }

  // What has been started arrives at the end of the wait, no sooner.
  void copy(unsigned char* to, const unsigned char* from, bool there) {
    copies_.push_back({to, there ? from : nullptr});
  }
  void wait_copies() {
    for (const auto& [to, from] : copies_) from == nullptr ? std::memset(to, 0, 16) : std::memcpy(to, from, 16);
    copies_.clear();
  }

  void load_fragment(const unsigned char* row, uint32_t (&a)[4]) const {
    Words mine;
    std::memcpy(mine.at, row, 16);
    exchanged(mine, [&](const auto& of) {
      for (int i = 0; i < 4; ++i) a[i] = of(8 * i + lane() / 4).at[lane() % 4];
      return mine;
    });
  }

  // Sums are rounded towards 0, as Hopper's are to about that (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor
  // cores"): where many are added up, errors do not cancel.
  template <class Type, int kFloats>
  void product(Type type, float (&d)[kFloats], const uint32_t (&a)[4], Right b, bool keep) const {
    double left[2][16];
    exchanged({{a[0], a[1], a[2], a[3]}}, [&](const auto& of) {
      for (int pair = 0; pair < 4; ++pair) {
        const Words theirs = of(lane() / 4 * 4 + pair);
        for (int word = 0; word < 4; ++word) {
          double* to = left[word % 2] + word / 2 * 8 + pair * 2;
          to[0] = widened(type, theirs.at[word] & 0xffffu);
          to[1] = widened(type, theirs.at[word] >> 16);
        }
      }
      return pair_of_zeros();
    });
    for (int i = 0; i < kFloats; i += 4) {
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * i + lane() % 4 * 2 + e;
        double right[16];
        for (int piece = 0; piece < 2; ++piece) {
          auto address = reinterpret_cast<uintptr_t>(b.place) + static_cast<uintptr_t>(column * 128 + piece * 16);
          address ^= (address >> 7 & 7) << 4;
          uint16_t values[8];
          std::memcpy(values, reinterpret_cast<const void*>(address), 16);
          for (int k = 0; k < 8; ++k) right[8 * piece + k] = widened(type, values[k]);
        }
        for (int h = 0; h < 2; ++h) {
          float& result = d[i + 2 * h + e];
          double sum = keep ? result : 0.0;
          for (int k = 0; k < 16; ++k) sum += left[h][k] * right[k];
          const auto nearest = static_cast<float>(sum);
          result = std::fabs(nearest) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
        }
      }
    }
  }

 private:
  int lane() const { return index_ % kWarp; }
  static Words pair_of_zeros() { return {}; }
  // Show something to the warp, and see of it what others show.
  template <class F>
  Words exchanged(Words mine, F&& see) const {
    all_.shown(index_) = mine;
    all_.sync_warp();
    const Words result = see([&](int lane) { return all_.shown(index_ / kWarp * kWarp + lane); });
    all_.sync_warp();
    return result;
  }

  HostThreads& all_;
  int index_;
  std::vector<std::pair<unsigned char*, const unsigned char*> > copies_;
};
#endif

// to = from, by all threads of a block, 16 bytes at a time.
template <class Thread>
FASTINV_BLOCK void copy_all(const Thread& self, int threads, unsigned char* to, const void* from, int bytes) {
  for (int i = 16 * self.index(); i < bytes; i += 16 * threads) {
    *reinterpret_cast<Words*>(to + i) = *reinterpret_cast<const Words*>(static_cast<const unsigned char*>(from) + i);
  }
}

// 0 in so many bytes, a multiple of 4.
template <class Thread>
FASTINV_BLOCK void clear_all(const Thread& self, int threads, unsigned char* to, int bytes) {
  for (int i = self.index(); i < bytes / 4; i += threads) reinterpret_cast<uint32_t*>(to)[i] = 0;
}

// A bias of so many numbers, or none, with 0 for what there is not.
template <int kCount, class Thread>
FASTINV_BLOCK void share_bias(const Thread& self, int threads, float* to, const float* bias, int count) {
  for (int i = self.index(); i < kCount; i += threads) to[i] = bias == nullptr || i >= count ? 0.0f : bias[i];
}

// Products along a pixel's channels, sixteen at a time: products(step, fragment) for each sixteen, which begin with
// those of kAtOnce fragments while the ones before are under way. These are as far apart as can be, so that where the
// halves of a pixel take more products and fewer, all groups take as long. `key`: of the order of the pixel's pieces;
// `ready` is called before the first products.
template <int kSteps, int kAtOnce, class Thread, class F, class Ready>
FASTINV_BLOCK void along_channels(Thread& self, uint32_t (&left)[2][kAtOnce][4], const unsigned char* pixel, int half,
                                  int key, F&& products, Ready&& ready) {
  constexpr int kGroups = kSteps / kAtOnce;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    uint32_t (&fragments)[kAtOnce][4] = left[group % 2];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      self.load_fragment(pixel + (((group + k * kGroups) * 2 + half) ^ key) * 16, fragments[k]);
    }
    if (group == 0) ready();
    self.begin_products();
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) products(group + k * kGroups, fragments[k]);
    self.end_products();
    self.template wait_products<1>();  // then the fragments before these are free
  }
}

}  // namespace fastinv
