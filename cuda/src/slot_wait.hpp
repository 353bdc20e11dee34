#pragma once

#include <thread>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// Waits for work that takes microseconds: asks again and again for a while before it sleeps, which
/// would take longer than the work. `what` goes into the message of Error(timeout).
inline void wait_briefly(const Event& event, Deadline deadline, const char* what) {
  constexpr std::chrono::microseconds kPatience{300};
  const auto end = Deadline::Clock::now() + kPatience;
  while (!event.done()) {
    if (Deadline::Clock::now() >= end || deadline.passed()) {
      try {
        event.wait(deadline);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::timeout) throw;
        throw Error(ErrorCode::timeout, std::string(what) + ": " + error.what());
      }
      return;
    }
    std::this_thread::yield();
  }
}

}  // namespace pipelive::cuda
