#include "upload.h"

#include <dlfcn.h>

#include <algorithm>
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

constexpr int64_t kShare = 1 << 19;       // bytes of a copy that a thread does at once
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

int64_t shares(const Copy& copy) { return (copy.bytes + kShare - 1) / kShare; }

void copy_share(const Copy& copy, int64_t share) {
  const int64_t begin = share * kShare, end = std::min(copy.bytes, begin + kShare);
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
  driver_->push_context(context_);  // at the program's end the driver may be gone: then all fails, and nothing is lost
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
  const int64_t pieces = (bytes + piece_ - 1) / piece_, all = pieces + shares(beside);
  parallel_ranges(threads_, all, 1, 1, [&](int worker, int64_t unit, int64_t) {
    const int64_t sent = unit * pieces / all;  // of the units before this one
    if ((unit + 1) * pieces / all == sent) return copy_share(beside, unit - sent);
    const int64_t begin = sent * piece_, size = std::min(bytes - begin, piece_);
    send_piece(worker, static_cast<const uint8_t*>(source) + (rounds ? 2 : 1) * begin,
               there + static_cast<uint64_t>(begin), size, rounds, stream);
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
