#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#ifndef _WIN32
#include <pthread.h>
#endif

namespace bitspike {
namespace {

class Workers {
 public:
  std::mutex use;  // held by the call that has the workers

  void run(size_t tasks, int helpers, const std::function<void(size_t)>& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; count_ < helpers; ++count_) std::thread(&Workers::work, this, count_, job_).detach();
      } catch (const std::system_error&) {
        // No more threads to be had: the ones there are, and the caller, do it all.
      }
      task_ = &task;
      tasks_ = tasks;
      next_ = 0;
      wanted_ = helpers < count_ ? helpers : count_;
      busy_ = wanted_;
      ++job_;
    }
    start_.notify_all();
    take_all(task, tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void take_all(const std::function<void(size_t)>& task, size_t tasks) {
    for (size_t i; (i = next_.fetch_add(1)) < tasks;) task(i);
  }

  void work(int index, unsigned long seen) {
    for (;;) {
      const std::function<void(size_t)>* task;
      size_t tasks;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return job_ != seen; });
        seen = job_;
        if (index >= wanted_) continue;
        task = task_;
        tasks = tasks_;
      }
      take_all(*task, tasks);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::atomic<size_t> next_{0};
  const std::function<void(size_t)>* task_ = nullptr;
  size_t tasks_ = 0;
  int count_ = 0, wanted_ = 0, busy_ = 0;
  unsigned long job_ = 0;
};

// Never destroyed: the workers are detached and may outlive static destructors. A forked child has none of the parent's
// threads, so it starts with a pool of its own.
std::atomic<Workers*> workers{nullptr};

#ifndef _WIN32
void forget_workers() { workers = nullptr; }
#endif

Workers* get_workers() {
  static const bool watching_fork = [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, forget_workers);
#endif
    return true;
  }();
  (void)watching_fork;
  Workers* now = workers;
  if (now) return now;
  Workers* fresh = new Workers;
  if (workers.compare_exchange_strong(now, fresh)) return fresh;
  delete fresh;
  return now;
}

}  // namespace

void parallel_for(size_t tasks, int threads, const std::function<void(size_t)>& task) {
  const size_t most = threads < 1 ? 1 : static_cast<size_t>(threads);
  const int helpers = static_cast<int>((tasks < most ? tasks : most)) - 1;
  if (helpers > 0) {
    Workers* pool = get_workers();
    std::unique_lock<std::mutex> held(pool->use, std::try_to_lock);
    if (held.owns_lock()) {
      pool->run(tasks, helpers, task);
      return;
    }
  }
  for (size_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace bitspike
