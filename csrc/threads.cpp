#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastinv {
namespace {

#if defined(__SSE__)
constexpr unsigned kFlush = 0x8040;  // FTZ and DAZ
#endif

class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlush); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// A pause that leaves the core's other thread its share, some 20 to 100 cycles long.
inline void relax() {
#if defined(__SSE__)
  _mm_pause();
#endif
}

// A thread that sleeps takes 5 to 50 µs to wake, in a virtual machine up to 250, as long as small networks run: so
// threads watch for the next job, or for the others, for longer than that first. Were it shorter, one late waking would
// put the other thread to sleep, whose waking would be late in turn, and so on.
constexpr std::chrono::microseconds kWatch{300};

// Between the layers of an image nobody sleeps, but may leave the core to another after this time.
constexpr std::chrono::microseconds kMeet{20};

// Whether `ready` became true within that time.
template <class Ready>
bool watch(std::chrono::microseconds time, const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

struct Job {
  const std::function<void(int, int)>* work;
  std::mutex error_mutex;
  std::exception_ptr error;

  void run(int worker, int workers) {
    const FlushDenormals flush;
    try {
      (*work)(worker, workers);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  std::mutex busy;  // held by the caller whose job is running

  // Runs the job on `helpers` pool threads beside the caller, or on as many as can be had. `busy` must be held.
  void run(Job& job, int helpers) {
    start(helpers);
    helpers = std::min(helpers, started_);
    job_ = &job;
    running_.store(helpers, std::memory_order_relaxed);
    const uint64_t before = call_.load(std::memory_order_relaxed);
    call_ = (before / kMostHelpers + 1) * kMostHelpers + static_cast<uint64_t>(helpers);
    // A thread counts itself among the sleepers before it looks for a call for the last time: it sees this one, or is
    // seen here.
    if (sleepers_ > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    job.run(0, helpers + 1);
    if (!watch(kWatch, [this] { return running_.load(std::memory_order_acquire) == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_ = true;
      done_.wait(lock, [this] { return running_.load(std::memory_order_acquire) == 0; });
      waiting_ = false;
    }
  }

  static constexpr uint64_t kMostHelpers = 1 << 16;

 private:
  void start(int helpers) {
    try {
      for (; started_ < helpers; ++started_) {
        std::thread([this, worker = started_ + 1] { serve(worker); }).detach();
      }
    } catch (const std::exception&) {  // a limit on threads or memory: the next call tries again
    }
  }

  void serve(int worker) {
    uint64_t seen = 0, call = 0;
    const auto called = [&] { return (call = call_) != seen; };
    for (;; seen = call) {
      // No mutex on this way: the caller would still hold it, and this thread go to sleep after all.
      if (!watch(kWatch, called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, called);
        --sleepers_;
      }
      const auto helpers = static_cast<int>(call % kMostHelpers);
      if (worker > helpers) continue;  // nor may it look at the job, which nobody keeps for it
      job_->run(worker, helpers + 1);
      // The job may be gone after the last decrement; the mutex is for a caller that has gone to sleep meanwhile.
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (waiting_) done_.notify_one();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int started_ = 0;
  bool waiting_ = false;
  std::atomic<int> sleepers_{0};
  std::atomic<int> running_{0};
  std::atomic<uint64_t> call_{0};  // the number of the last one · kMostHelpers + the helpers called
};

// Never destroyed: pool threads may outlive main(). After fork() the child has none of the threads and perhaps a
// locked mutex, so it leaves the old pool alone and takes a new one.
Pool* pool = new Pool;
std::mutex* workspaces = new std::mutex;
const int fork_handler = pthread_atfork([] { workspaces->lock(); }, [] { workspaces->unlock(); },
                                        [] {
                                          workspaces->unlock();
                                          pool = new Pool;
                                        });

}  // namespace

std::mutex& workspaces_mutex() { return *workspaces; }

KeepDenormals::KeepDenormals() {
#if defined(__SSE__)
  before_ = _mm_getcsr();
  _mm_setcsr(before_ & ~kFlush);
#endif
}

KeepDenormals::~KeepDenormals() {
#if defined(__SSE__)
  _mm_setcsr(before_);
#endif
}

void run_team(int threads, const std::function<void(int, int)>& work) {
  Job job;
  job.work = &work;
  Pool& shared = *pool;
  std::unique_lock<std::mutex> claim(shared.busy, std::defer_lock);
  if (threads > 1 && claim.try_lock()) {
    shared.run(job, threads - 1);
  } else {
    job.run(0, 1);
  }
  if (job.error) std::rethrow_exception(job.error);
}

void parallel_ranges(int threads, int64_t n, int64_t step, int64_t most,
                     const std::function<void(int, int64_t, int64_t)>& work) {
  const int64_t steps = (n + step - 1) / step;
  std::atomic<int64_t> next{0};  // in steps
  std::atomic<bool> failed{false};
  run_team(static_cast<int>(std::min<int64_t>(threads, steps)), [&](int worker, int workers) {
    for (int64_t first = next; first < steps && !failed.load(std::memory_order_relaxed);) {
      const int64_t share = workers > 1 ? (steps - first) / (2 * workers) : steps;
      const int64_t last = std::min(steps, first + std::clamp<int64_t>(share, 1, std::max<int64_t>(1, most / step)));
      if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
      try {
        work(worker, first * step, std::min(last * step, n));
      } catch (...) {
        failed = true;
        throw;
      }
      first = next;
    }
  });
}

void Barrier::wait(int workers) {
  const int round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  const auto opened = [&] { return round_.load(std::memory_order_acquire) != round; };
  if (watch(kMeet, opened)) return;
  while (!opened()) std::this_thread::yield();
}

int available_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace fastinv
