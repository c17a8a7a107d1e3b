#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#ifndef _WIN32
#include <pthread.h>
#endif

namespace bitspike {
namespace {

constexpr auto kAwake = std::chrono::microseconds(100);  // a worker waits so long for more before it sleeps

class Workers {
 public:
  std::mutex use;  // held by the call that has the workers

  void run(int helpers, const std::function<void(int)>& work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; count_ < helpers; ++count_) std::thread(&Workers::live, this, job_.load()).detach();
      } catch (const std::system_error&) {
        // No more threads to be had: the ones there are, and the caller, do it all.
      }
      work_ = &work;
      joined_ = 0;
      places_ = helpers;
      job_.fetch_add(1, std::memory_order_release);
      if (asleep_) start_.notify_all();
    }
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;  // whoever wakes up now is too late
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void live(unsigned long seen) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      while (job_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
        std::this_thread::yield();
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      start_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
      --asleep_;
      seen = job_.load(std::memory_order_relaxed);
      if (joined_ >= places_) continue;
      const int index = ++joined_;
      ++busy_;
      const std::function<void(int)>& work = *work_;
      lock.unlock();
      work(index);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;  // of everything below; job_ is also read without it
  std::condition_variable start_, done_;
  std::atomic<unsigned long> job_{0};
  const std::function<void(int)>* work_ = nullptr;
  int count_ = 0, asleep_ = 0, places_ = 0, joined_ = 0, busy_ = 0;
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

void team(int threads, const std::function<void(int)>& work) {
  if (threads > 1) {
    Workers* pool = get_workers();
    std::unique_lock<std::mutex> held(pool->use, std::try_to_lock);
    if (held.owns_lock()) {
      pool->run(threads - 1, work);
      return;
    }
  }
  work(0);
}

void parallel_for(size_t tasks, int threads, const std::function<void(size_t)>& task) {
  const size_t most = threads < 1 ? 1 : static_cast<size_t>(threads);
  std::atomic<size_t> next{0};
  team(static_cast<int>(tasks < most ? tasks : most), [&](int) {
    for (size_t i; (i = next.fetch_add(1)) < tasks;) task(i);
  });
}

}  // namespace bitspike
