#include "pipelive/cuda/event_pool.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {

using std::chrono::microseconds;
using std::chrono::nanoseconds;

EventPool::EventPool(std::shared_ptr<const PrimaryContext> context)
    : context_(std::move(context)) {}

EventPool::~EventPool() {
  try {
    const CallScope scope(*context_);
    for (const EventHandle event : free_) context_->driver().api().event_destroy(event);
  } catch (const Error&) {
    // The context is gone, and its events with it.
  }
}

EventHandle EventPool::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      const EventHandle event = free_.back();
      free_.pop_back();
      return event;
    }
    // So that giving back cannot fail: room for one more than has ever been out.
    free_.reserve(free_.capacity() + 1);
  }
  const Driver& driver = context_->driver();
  EventHandle event = nullptr;
  driver.check(driver.api().event_create(&event, kEventDisableTiming), "cuEventCreate");
  return event;
}

void EventPool::give_back(EventHandle event) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(event);
}

std::shared_ptr<Event> EventPool::record(StreamHandle stream) {
  auto event = std::make_shared<CudaEvent>(shared_from_this(), take());
  const Driver& driver = context_->driver();
  driver.check(driver.api().event_record(event->handle(), stream), "cuEventRecord");
  return event;
}

CudaEvent::CudaEvent(std::shared_ptr<EventPool> pool, EventHandle handle)
    : pool_(std::move(pool)), handle_(handle) {}

CudaEvent::~CudaEvent() {
  pool_->give_back(handle_);
}

bool CudaEvent::done() const {
  if (done_.load(std::memory_order_acquire)) return true;
  const PrimaryContext& context = *pool_->context();
  const CallScope scope(context);
  const Result result = context.driver().api().event_query(handle_);
  if (result == kNotReady) return false;
  context.driver().check(result, "cuEventQuery");
  done_.store(true, std::memory_order_release);
  return true;
}

void CudaEvent::wait(Deadline deadline) const {
  constexpr int kQuickTries = 20;
  constexpr nanoseconds kLongestPause = microseconds(500);
  nanoseconds pause = microseconds(5);
  for (int tries = 0; !done(); ++tries) {
    if (deadline.passed()) {
      throw Error(ErrorCode::timeout, "work on a CUDA stream did not complete before the deadline");
    }
    if (tries < kQuickTries) {
      std::this_thread::yield();
      continue;
    }
    std::this_thread::sleep_for(std::min(pause, deadline.remaining()));
    pause = std::min(2 * pause, kLongestPause);
  }
}

}  // namespace pipelive::cuda
