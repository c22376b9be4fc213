#include "upload.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "threads.h"

namespace fastinv {

// By the names and signatures of cuda.h; that header and the library itself are not needed to build this.
struct Driver {
  explicit Driver(const std::string& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW);
    if (handle == nullptr) throw std::invalid_argument(std::string("no CUDA driver: ") + dlerror());
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
      if (function == nullptr) throw std::invalid_argument(library + " has no " + name);
    };
    find(stream_context, "cuStreamGetCtx");
    find(push_context, "cuCtxPushCurrent_v2");
    find(pop_context, "cuCtxPopCurrent_v2");
    find(copy, "cuMemcpyHtoDAsync_v2");
    find(create_event, "cuEventCreate");
    find(record_event, "cuEventRecord");
    find(wait_for_event, "cuEventSynchronize");
    find(destroy_event, "cuEventDestroy_v2");
  }

  static void check(int result, const char* what) {
    if (result != 0)
      throw std::runtime_error(std::string(what) + ": CUDA's driver says error " + std::to_string(result));
  }

  int (*stream_context)(void* stream, void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*copy)(uint64_t there, const void* from, size_t bytes, void* stream);
  int (*create_event)(void** event, unsigned flags);
  int (*record_event)(void* event, void* stream);
  int (*wait_for_event)(void* event);
  int (*destroy_event)(void* event);
};

namespace {

// Bytes of a copy that a thread does at once, and what their address is a multiple of: a huge page. Where the target is
// fresh, the first to write to one clears all of it, and so does whoever writes to it meanwhile: two threads of a Zen 3
// moved 12.1 GB/s into fresh huge pages so, 10.4 in shares of 512 KiB.
constexpr int64_t kShare = 1 << 21;
constexpr int64_t kGrains = 4;            // of a piece: towards a call's end threads send less at once, to end together
constexpr unsigned kWithoutTiming = 0x2;  // CU_EVENT_DISABLE_TIMING

// Within, this is the calling thread's context: the pool's threads have none, and may have another next.
class InContext {
 public:
  InContext(const Driver& driver, void* context) : driver_(driver) {
    Driver::check(driver_.push_context(context), "cuCtxPushCurrent");
  }
  ~InContext() {
    void* context = nullptr;
    driver_.pop_context(&context);
  }

 private:
  const Driver& driver_;
};

int64_t before_target(const Copy& copy) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(copy.to) % kShare); }

int64_t shares(const Copy& copy) {
  return copy.bytes == 0 ? 0 : (before_target(copy) + copy.bytes + kShare - 1) / kShare;
}

void copy_share(const Copy& copy, int64_t share) {
  const int64_t start = share * kShare - before_target(copy);
  const int64_t begin = std::max<int64_t>(0, start), end = std::min(copy.bytes, start + kShare);
  std::memcpy(copy.to + begin, copy.from + begin, static_cast<size_t>(end - begin));
}

}  // namespace

void copy(const Copy& copy, int threads) {
  parallel_ranges(threads, shares(copy), 1, 1, [&](int, int64_t first, int64_t) { copy_share(copy, first); });
}

Upload::Upload(const Kernels& kernels, uint8_t* pinned, int64_t piece, int threads, const std::string& driver)
    : kernels_(kernels),
      pinned_(pinned),
      piece_(piece),
      threads_(threads),
      driver_(driver.empty() ? nullptr : std::make_unique<Driver>(driver)),
      gone_(static_cast<size_t>(kPieces * threads)),
      turns_(static_cast<size_t>(threads)) {}

Upload::~Upload() {
  if (context_ == nullptr) return;
  // At the program's end the driver may be gone, and after a fork it knows no context: then nothing is lost.
  if (driver_->push_context(context_) != 0) return;
  for (void* event : gone_) {
    if (event == nullptr) continue;
    driver_->wait_for_event(event);
    driver_->destroy_event(event);
  }
  void* context = nullptr;
  driver_->pop_context(&context);
}

void Upload::send(const void* source, uint64_t there, int64_t bytes, bool rounds, void* stream, const Copy& beside) {
  if (driver_ != nullptr) Driver::check(driver_->stream_context(stream, &context_), "cuStreamGetCtx");
  const int64_t grain = std::max<int64_t>(4, piece_ / kGrains / 4 * 4), grains = (bytes + grain - 1) / grain;
  const int64_t copies = shares(beside);
  std::atomic<int64_t> next{0}, next_copy{0};
  std::atomic<bool> failed{false};
  run_team(static_cast<int>(std::min<int64_t>(threads_, grains + copies)), [&](int worker, int workers) {
    while (!failed.load(std::memory_order_relaxed)) {
      int64_t first = next, share = next_copy;
      // A share of the copy takes longer than a grain: all are begun by the time three quarters of the source have
      // been, so that grains are last.
      if (share < copies && (first == grains || 3 * share * grains <= 4 * first * copies)) {
        if (next_copy.compare_exchange_weak(share, share + 1)) copy_share(beside, share);
        continue;
      }
      if (first == grains) return;
      const int64_t some = std::clamp<int64_t>((grains - first) / (2 * workers), 1, piece_ / grain);
      if (!next.compare_exchange_weak(first, first + some)) continue;
      const int64_t begin = first * grain, size = std::min(bytes - begin, some * grain);
      try {
        send_piece(worker, static_cast<const uint8_t*>(source) + (rounds ? 2 : 1) * begin,
                   there + static_cast<uint64_t>(begin), size, rounds, stream);
      } catch (...) {
        failed = true;
        throw;
      }
    }
  });
}

void Upload::send_piece(int worker, const uint8_t* source, uint64_t there, int64_t bytes, bool rounds, void* stream) {
  int& turn = turns_[static_cast<size_t>(worker)];
  const int64_t place = worker * kPieces + turn;
  turn = (turn + 1) % kPieces;
  uint8_t* const piece = pinned_ + place * piece_;
  const auto fill = [&] {
    if (rounds) {
      kernels_.bring_as_bfloat16(reinterpret_cast<const float*>(source), reinterpret_cast<uint16_t*>(piece), bytes / 2);
    } else {
      kernels_.bring(source, piece, bytes);
    }
  };
  if (driver_ == nullptr) {
    fill();
    std::memcpy(reinterpret_cast<void*>(there), piece, static_cast<size_t>(bytes));
    return;
  }
  const InContext context(*driver_, context_);
  void*& gone = gone_[static_cast<size_t>(place)];
  if (gone == nullptr) {
    Driver::check(driver_->create_event(&gone, kWithoutTiming), "cuEventCreate");
  } else {
    Driver::check(driver_->wait_for_event(gone), "cuEventSynchronize");
  }
  fill();
  Driver::check(driver_->copy(there, piece, static_cast<size_t>(bytes), stream), "cuMemcpyHtoDAsync");
  Driver::check(driver_->record_event(gone, stream), "cuEventRecord");
}

}  // namespace fastinv
