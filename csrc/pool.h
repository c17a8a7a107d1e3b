// Threads that stay alive between calls.
#pragma once
#include <cstddef>
#include <functional>

namespace bitspike {

// Calls task(0) .. task(tasks - 1), on up to `threads` threads counting the caller; returns when all are done.
// Tasks must not throw. While another call holds the workers, the caller does its tasks alone. Safe after fork().
void parallel_for(size_t tasks, int threads, const std::function<void(size_t)>& task);

}  // namespace bitspike
