// Threads that stay alive between calls.
#pragma once
#include <cstddef>
#include <functional>

namespace bitspike {

// Calls work(0) on this thread and work(1) .. on up to `threads` - 1 others, all at the same time, as long as work(0)
// runs: a worker that has not begun by then does not begin at all. Returns when all are back. `work` must not throw, and
// must get everything done even if nobody but the caller comes: while another call holds the workers, nobody does.
// Safe after fork().
void team(int threads, const std::function<void(int)>& work);

// Calls task(0) .. task(tasks - 1), on up to `threads` threads counting the caller; returns when all are done.
// Tasks must not throw.
void parallel_for(size_t tasks, int threads, const std::function<void(size_t)>& task);

}  // namespace bitspike
