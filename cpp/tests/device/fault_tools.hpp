#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>

#include "device_test_tools.hpp"
#include "pipelive/device/fault_device.hpp"

namespace pipelive::testing {

/// Runs `action` again and again, making in turn the first, second, ... call of every kind fail.
/// After each failure `check` is run; after each success `undo`, which restores the state before.
/// Returns how many failures of each kind there were. Other threads must not use the device.
inline std::map<DeviceCall, std::uint64_t> fail_each_call(FaultDevice& device,
                                                          const std::function<void()>& action,
                                                          const std::function<void()>& undo,
                                                          const std::function<void()>& check) {
  std::map<DeviceCall, std::uint64_t> failures;
  for (std::size_t kind = 0; kind < kDeviceCallCount; ++kind) {
    const auto call = static_cast<DeviceCall>(kind);
    for (std::uint64_t nth = 1; nth < 1000; ++nth) {
      const ::testing::ScopedTrace trace(
          __FILE__, __LINE__, std::string(to_string(call)) + " call " + std::to_string(nth));
      device.fail(call, nth);
      const int code = code_of(action);
      device.disarm();
      if (code < 0) {
        undo();
        break;
      }
      EXPECT_EQ(code, static_cast<int>(ErrorCode::device));
      ++failures[call];
      check();
      if (::testing::Test::HasFailure()) return failures;
    }
  }
  return failures;
}

}  // namespace pipelive::testing
