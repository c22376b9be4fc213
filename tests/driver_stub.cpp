// A stand-in for CUDA's driver: copies to the "device", which is the host's memory, are made later, in their order, by
// a thread of its own. Whoever fills a piece of memory again before it has gone is found out by what arrives.
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace {

constexpr int kInvalidContext = 201, kIllegalAddress = 700;

struct Event {
  bool recorded = false, done = false;
};

// Never destroyed: at the program's end the thread still waits.
auto& mutex = *new std::mutex;
auto& change = *new std::condition_variable;
auto& queue = *new std::deque<std::function<void()>>;
int64_t until_failure = -1;
int context, stream;  // whatever is at these addresses
thread_local void* current = nullptr;

void serve() {
  for (;;) {
    std::function<void()> next;
    {
      std::unique_lock<std::mutex> lock(mutex);
      change.wait(lock, [] { return !queue.empty(); });
      next = queue.front();
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    next();
    const std::lock_guard<std::mutex> lock(mutex);
    queue.pop_front();
    change.notify_all();
  }
}

int later(std::function<void()> work) {
  static const bool started = (std::thread(serve).detach(), true);
  (void)started;
  const std::lock_guard<std::mutex> lock(mutex);
  queue.push_back(std::move(work));
  change.notify_all();
  return 0;
}

}  // namespace

extern "C" {

void* stub_stream() { return &stream; }

// The copy after so many more fails.
void stub_fail_after(int64_t copies) { until_failure = copies; }

void stub_wait() {
  std::unique_lock<std::mutex> lock(mutex);
  change.wait(lock, [] { return queue.empty(); });
}

int cuStreamGetCtx(void* of, void** found) {
  *found = &context;
  return of == &stream ? 0 : kInvalidContext;
}

int cuCtxPushCurrent_v2(void* next) {
  if (current != nullptr) return kInvalidContext;
  current = next;
  return 0;
}

int cuCtxPopCurrent_v2(void** last) {
  *last = current;
  current = nullptr;
  return 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t there, const void* from, size_t bytes, void*) {
  if (current != &context) return kInvalidContext;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (until_failure >= 0 && until_failure-- == 0) return kIllegalAddress;
  }
  return later([=] { std::memcpy(reinterpret_cast<void*>(there), from, bytes); });
}

int cuEventCreate(void** event, unsigned) {
  *event = new Event;
  return current == &context ? 0 : kInvalidContext;
}

int cuEventRecord(void* event, void*) {
  auto* recorded = static_cast<Event*>(event);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    recorded->recorded = true;
    recorded->done = false;
  }
  return later([recorded] {
    const std::lock_guard<std::mutex> lock(mutex);
    recorded->done = true;
  });
}

int cuEventSynchronize(void* event) {
  if (current != &context) return kInvalidContext;
  auto* waited = static_cast<Event*>(event);
  std::unique_lock<std::mutex> lock(mutex);
  change.wait(lock, [waited] { return !waited->recorded || waited->done; });
  return 0;
}

int cuEventDestroy_v2(void* event) {
  if (current != &context) return kInvalidContext;
  delete static_cast<Event*>(event);
  return 0;
}

}  // extern "C"
