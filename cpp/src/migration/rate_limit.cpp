#include "pipelive/migration/rate_limit.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

double checked(double rate) {
  if (!(rate >= 0.0) || std::isinf(rate)) {
    throw Error(ErrorCode::invalid_argument, "the rate limit is " + std::to_string(rate) +
                                                 " bytes per second, expected 0 (none) or more");
  }
  return rate;
}

}  // namespace

RateLimit::RateLimit(double bytes_per_second, std::size_t burst)
    : rate_(checked(bytes_per_second)),
      burst_(static_cast<double>(std::max<std::size_t>(1, burst))),
      tokens_(burst_),
      filled_at_(Clock::now()) {}

void RateLimit::refill() {
  const Clock::time_point now = Clock::now();
  tokens_ =
      std::min(burst_, tokens_ + rate_ * std::chrono::duration<double>(now - filled_at_).count());
  filled_at_ = now;
}

void RateLimit::charge(std::size_t bytes, Deadline deadline) {
  std::unique_lock lock(mutex_);
  const auto amount = static_cast<double>(bytes);
  while (true) {
    if (cancelled_) throw Error(ErrorCode::cancelled, "the transfer was cancelled");
    if (rate_ == 0.0) return;
    refill();
    const double needed = std::min(amount, burst_);
    if (tokens_ >= needed) {
      tokens_ -= amount;
      return;
    }
    if (deadline.passed()) {
      throw Error(ErrorCode::timeout, "the rate limit of " + std::to_string(rate_) +
                                          " bytes per second did not let " + std::to_string(bytes) +
                                          " bytes pass before the deadline");
    }
    // At most an hour, so that a tiny rate does not overflow the clock.
    const double seconds = std::min(3600.0, (needed - tokens_) / rate_);
    const auto ready =
        Clock::now() + std::chrono::nanoseconds(static_cast<long long>(seconds * 1e9) + 1);
    changed_.wait_until(lock, std::min(ready, deadline.at()));
  }
}

void RateLimit::set(double bytes_per_second) {
  const double rate = checked(bytes_per_second);
  const std::lock_guard lock(mutex_);
  refill();
  rate_ = rate;
  changed_.notify_all();
}

void RateLimit::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

}  // namespace pipelive
