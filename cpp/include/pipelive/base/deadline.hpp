#pragma once

#include <algorithm>
#include <chrono>

namespace pipelive {

/// A point in time after which a wait gives up. Every wait of the core takes one.
class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] static Deadline after(std::chrono::nanoseconds duration) {
    return Deadline(Clock::now() + duration);
  }
  [[nodiscard]] static Deadline after_seconds(double seconds) {
    return after(std::chrono::nanoseconds(static_cast<long long>(seconds * 1e9)));
  }

  [[nodiscard]] bool passed() const { return Clock::now() >= at_; }
  [[nodiscard]] Clock::time_point at() const { return at_; }
  [[nodiscard]] std::chrono::nanoseconds remaining() const {
    return std::max(std::chrono::nanoseconds::zero(),
                    std::chrono::duration_cast<std::chrono::nanoseconds>(at_ - Clock::now()));
  }

 private:
  explicit Deadline(Clock::time_point at) : at_(at) {}
  Clock::time_point at_;
};

}  // namespace pipelive
