// One pool of threads for the whole process.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>

namespace fastinv {

// Calls work(worker, workers) once on each of `workers` threads at the same time, the caller among them as worker 0.
// There are up to `threads` of them, and one alone when the pool is busy with another caller's work: as many threads
// run as were asked for, never more. Exceptions in `work` are passed on. Denormal numbers are flushed to zero while
// it runs: they would cost a hundred cycles each in the moments of an optimizer.
void run_team(int threads, const std::function<void(int worker, int workers)>& work);

// Within, denormal numbers are kept: for what is not ours, called from the work of run_team.
class KeepDenormals {
 public:
  KeepDenormals();
  ~KeepDenormals();

 private:
  unsigned before_ = 0;
};

// Of all pools of workspaces. A fork waits for it: the child never finds it locked, nor a pool half changed.
std::mutex& workspaces_mutex();

// Calls work(worker, first, last) for stretches [first, last) of n units in a row, on up to `threads` workers
// (0 <= worker < threads); which worker takes which varies. `most` units at once, or as many as leave every worker
// another turn, fewer and fewer towards the end so that all end together. All but the last are whole multiples of
// `step`.
void parallel_ranges(int threads, int64_t n, int64_t step, int64_t most,
                     const std::function<void(int worker, int64_t first, int64_t last)>& work);

// Where the workers of a team wait for each other. Nothing may throw between barriers.
class Barrier {
 public:
  void wait(int workers);  // the same number from all of them

 private:
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

// The number of processors this process may run on.
int available_threads();

}  // namespace fastinv
