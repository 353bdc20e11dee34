#include "pipelive/attention/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pipelive {

struct ThreadPool::State {
  /// One call of run; it lives on the caller's stack until every worker has left it.
  struct Job {
    const std::function<void(std::size_t)>* work;
    std::size_t items;
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  ///< written by the one that set `failed`

    void take_part() {
      for (;;) {
        const std::size_t item = next.fetch_add(1, std::memory_order_relaxed);
        if (item >= items) return;
        try {
          (*work)(item);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
          next.store(items, std::memory_order_relaxed);
        }
      }
    }
  };

  std::mutex one_job;  ///< held by the thread whose job runs
  mutable std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable idle;
  std::vector<std::thread> workers;
  Job* job = nullptr;   ///< open for joining
  unsigned places = 0;  ///< workers that may still join it
  unsigned inside = 0;  ///< workers that have joined it and not left
  bool stopping = false;

  void serve() {
    std::unique_lock lock(mutex);
    for (;;) {
      wake.wait(lock, [this] { return stopping || (job != nullptr && places > 0); });
      if (stopping) return;
      Job* const mine = job;
      --places;
      ++inside;
      lock.unlock();
      mine->take_part();
      lock.lock();
      if (--inside == 0) idle.notify_one();
    }
  }

  /// Starts workers until there are `count`; fewer where the system refuses.
  void grow(unsigned count) {
    while (!stopping && workers.size() < count) {
      try {
        workers.emplace_back([this] { serve(); });
      } catch (const std::system_error&) {
        return;
      }
    }
  }
};

ThreadPool::ThreadPool() : state_(std::make_unique<State>()) {}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() {
  const std::scoped_lock running(state_->one_job);
  std::vector<std::thread> workers;
  {
    const std::scoped_lock lock(state_->mutex);
    state_->stopping = true;
    workers.swap(state_->workers);
  }
  state_->wake.notify_all();
  for (std::thread& worker : workers) worker.join();
}

void ThreadPool::run(unsigned threads, std::size_t items,
                     const std::function<void(std::size_t)>& work) {
  State::Job job{&work, items};
  const std::unique_lock running(state_->one_job, std::try_to_lock);
  const auto helpers = static_cast<unsigned>(
      std::min<std::size_t>(threads > 0 ? threads - 1 : 0, items > 0 ? items - 1 : 0));
  if (!running.owns_lock() || helpers == 0) {
    job.take_part();
    if (job.error) std::rethrow_exception(job.error);
    return;
  }
  {
    const std::scoped_lock lock(state_->mutex);
    state_->grow(helpers);
    state_->job = &job;
    state_->places = helpers;
  }
  if (helpers == 1) {
    state_->wake.notify_one();
  } else {
    state_->wake.notify_all();
  }
  job.take_part();
  // Workers that have not come yet find the job closed; those inside finish their last item.
  std::unique_lock lock(state_->mutex);
  state_->job = nullptr;
  state_->places = 0;
  state_->idle.wait(lock, [this] { return state_->inside == 0; });
  if (job.error) std::rethrow_exception(job.error);
}

unsigned ThreadPool::workers() const {
  const std::scoped_lock lock(state_->mutex);
  return static_cast<unsigned>(state_->workers.size());
}

namespace {

std::atomic<ThreadPool*> process_pool{nullptr};
std::mutex* making_pool = nullptr;

/// Joins the workers when the process exits. The pool itself is reached through the pointer, which
/// a forked child clears: the workers of the parent do not exist there and must not be joined.
struct AtExit {
  AtExit() {
    making_pool = new std::mutex;
    pthread_atfork(nullptr, nullptr, [] {
      process_pool.store(nullptr);
      making_pool = new std::mutex;  // the old one may have been held by a thread that is gone
    });
  }
  // The pool stays, for a thread that may still be computing while the process exits.
  ~AtExit() {
    if (ThreadPool* const pool = process_pool.load()) pool->stop();
  }
};

}  // namespace

ThreadPool& ThreadPool::process() {
  static const AtExit at_exit;
  if (ThreadPool* const pool = process_pool.load(std::memory_order_acquire)) return *pool;
  const std::scoped_lock lock(*making_pool);
  ThreadPool* pool = process_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    pool = new ThreadPool;
    process_pool.store(pool, std::memory_order_release);
  }
  return *pool;
}

unsigned ThreadPool::hardware_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return static_cast<unsigned>(count);
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace pipelive
