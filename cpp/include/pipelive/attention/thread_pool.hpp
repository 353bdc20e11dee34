#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace pipelive {

/// Threads that share out the items of one job at a time. Workers start when first needed and sleep
/// between jobs.
class ThreadPool {
 public:
  ThreadPool();
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Calls `work(item)` once for each item in [0, items), on the calling thread and on up to
  /// `threads` - 1 workers, and returns when all calls have. Items are begun in ascending order.
  /// While another thread's job runs, or where no worker can be started, the caller does all of the
  /// work. `work` must not call run. Where a call throws, items not yet begun are left out and the
  /// first exception is thrown again here.
  void run(unsigned threads, std::size_t items, const std::function<void(std::size_t)>& work);

  /// Joins the workers; run does all of its work on the caller from then on.
  void stop();

  /// Workers that exist.
  [[nodiscard]] unsigned workers() const;

  /// The pool of this process: made on first use, joined at exit, made anew in a forked child.
  [[nodiscard]] static ThreadPool& process();
  /// Processors that this process may run on, at least 1.
  [[nodiscard]] static unsigned hardware_threads();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pipelive
