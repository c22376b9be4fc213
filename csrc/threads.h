// One pool of threads for the whole process.
#pragma once

#include <cstdint>
#include <functional>

namespace fastinv {

// Calls work(worker, task) for every task in [0, tasks), on up to `threads` workers (0 <= worker < threads), the
// caller among them. Which worker takes which task varies. When the pool is busy with another caller's work, the
// caller does all of its own: as many threads run as were asked for, never more. Exceptions in `work` are passed on.
// Denormal numbers are flushed to zero while `work` runs: they would cost a hundred cycles each in the moments of
// an optimizer.
void parallel_for(int threads, int64_t tasks, const std::function<void(int worker, int64_t task)>& work);

// The number of processors this process may run on.
int available_threads();

}  // namespace fastinv
