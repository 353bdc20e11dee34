#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>

#include "pipelive/base/deadline.hpp"

namespace pipelive {

/// A token bucket in bytes. It may be changed or cancelled while somebody waits.
///
/// A charge larger than the bucket is let through when the bucket is full and leaves a debt, so
/// that any message can pass and the average still holds.
class RateLimit {
 public:
  /// `bytes_per_second` 0 means no limit; `burst` is the size of the bucket.
  RateLimit(double bytes_per_second, std::size_t burst);

  /// Waits until `bytes` may go. Throws Error(timeout), or Error(cancelled) after cancel().
  void charge(std::size_t bytes, Deadline deadline);
  void set(double bytes_per_second);
  void cancel();

 private:
  using Clock = Deadline::Clock;
  void refill();

  std::mutex mutex_;
  std::condition_variable changed_;
  double rate_;
  double burst_;
  double tokens_;
  Clock::time_point filled_at_;
  bool cancelled_ = false;
};

}  // namespace pipelive
