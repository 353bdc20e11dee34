#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "pipelive/cuda/driver.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// Driver events of one context, kept for reuse: creating one costs far more than recording it.
/// Thread-safe.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  explicit EventPool(std::shared_ptr<const PrimaryContext> context);
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  /// Records an event behind the work that `stream` has been given so far. The context must be
  /// current (CallScope). Throws Error(device).
  [[nodiscard]] std::shared_ptr<Event> record(StreamHandle stream);

  [[nodiscard]] const std::shared_ptr<const PrimaryContext>& context() const noexcept {
    return context_;
  }

 private:
  friend class CudaEvent;
  [[nodiscard]] EventHandle take();
  void give_back(EventHandle event) noexcept;

  const std::shared_ptr<const PrimaryContext> context_;
  std::mutex mutex_;
  std::vector<EventHandle> free_;
};

/// A recorded driver event; its handle goes back to the pool with the object.
class CudaEvent final : public Event {
 public:
  CudaEvent(std::shared_ptr<EventPool> pool, EventHandle handle);
  ~CudaEvent() override;
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  [[nodiscard]] bool done() const override;
  /// Asks the driver again and again, with growing pauses of at most half a millisecond: the
  /// driver's own waits know no deadline.
  void wait(Deadline deadline) const override;
  [[nodiscard]] EventHandle handle() const noexcept { return handle_; }

 private:
  const std::shared_ptr<EventPool> pool_;
  const EventHandle handle_;
  mutable std::atomic<bool> done_{false};
};

}  // namespace pipelive::cuda
