#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastinv {
namespace {

class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }  // FTZ and DAZ
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

struct Job {
  const std::function<void(int, int64_t)>* work;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex error_mutex;
  std::exception_ptr error;

  void run(int worker) {
    const FlushDenormals flush;
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks || failed.load(std::memory_order_relaxed)) return;
      try {
        (*work)(worker, task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        failed = true;
      }
    }
  }
};

class Pool {
 public:
  std::mutex busy;  // held by the caller whose job is running

  // Runs the job on `helpers` pool threads beside the caller. `busy` must be held.
  void run(Job& job, int helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < helpers) {
        const int worker = ++started_;
        std::thread([this, worker] { serve(worker); }).detach();
      }
      job_ = &job;
      helpers_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void serve(int worker) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen && job_ != nullptr; });
        seen = generation_;
        if (worker > helpers_) continue;
        job = job_;
      }
      job->run(worker);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int helpers_ = 0;
  int running_ = 0;
  int started_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: pool threads may outlive main(). After fork() the child has none of the threads and perhaps a
// locked mutex, so it leaves the old pool alone and takes a new one.
Pool* pool = new Pool;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel_for(int threads, int64_t tasks, const std::function<void(int, int64_t)>& work) {
  Job job;
  job.work = &work;
  job.tasks = tasks;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
  Pool& shared = *pool;
  std::unique_lock<std::mutex> claim(shared.busy, std::defer_lock);
  if (helpers > 0 && claim.try_lock()) {
    shared.run(job, helpers);
  } else {
    job.run(0);
  }
  if (job.error) std::rethrow_exception(job.error);
}

int available_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace fastinv
