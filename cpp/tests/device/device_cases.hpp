#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "device/device_test_tools.hpp"
#include "pipelive/device/fault_device.hpp"
#include "pipelive/device/host_device.hpp"

// The devices that the contract suites run on. Other executables that compile the suites name a
// header that defines device_cases() with devices of their own.

namespace pipelive::testing {

struct DeviceCase {
  std::string name;
  /// Throws Error(device) where the device cannot be had here; its message is why tests skip.
  std::function<std::shared_ptr<Device>()> make;
  /// Whether an access to the address would work.
  std::function<bool(Device&, const std::byte*)> accessible;
  /// Checks what only this kind of device can tell, after each test.
  std::function<void()> finish = [] {};
};

[[nodiscard]] std::vector<DeviceCase> device_cases();

inline void PrintTo(const DeviceCase& device_case, std::ostream* out) {
  *out << device_case.name;
}

inline std::string case_name(const ::testing::TestParamInfo<DeviceCase>& info) {
  return info.param.name;
}

/// A device of the case, wrapped so that calls can be made to fail.
class DeviceFixture : public ::testing::Test {
 protected:
  [[nodiscard]] virtual const DeviceCase& device_case() const = 0;

  void SetUp() override {
    try {
      device_ = device_case().make();
    } catch (const Error& error) {
      // Where there is a GPU a test that has not come to it has failed.
      if (std::getenv("PIPELIVE_REQUIRE_GPU") != nullptr) throw;
      GTEST_SKIP() << error.what();
    }
    fault_ = std::make_shared<FaultDevice>(device_);
    page_ = device_->info().page_granularity;
  }
  void TearDown() override {
    if (device_ == nullptr) return;
    fault_->disarm();
    EXPECT_EQ(device_->usage(), DeviceUsage{});
    fault_.reset();
    device_.reset();
    device_case().finish();
  }

  [[nodiscard]] bool accessible(const std::byte* address) const {
    return device_case().accessible(*device_, address);
  }
  void poke(std::byte* address, int value) const {
    write(*device_, address, {static_cast<std::byte>(value)});
  }
  [[nodiscard]] int peek(const std::byte* address) const {
    return static_cast<int>(read(*device_, address, 1).front());
  }

  std::shared_ptr<Device> device_;
  std::shared_ptr<FaultDevice> fault_;
  std::size_t page_ = 0;
};

class DeviceTest : public DeviceFixture, public ::testing::WithParamInterface<DeviceCase> {
 protected:
  [[nodiscard]] const DeviceCase& device_case() const override { return GetParam(); }
};

}  // namespace pipelive::testing

#ifdef PIPELIVE_DEVICE_CASES
#include PIPELIVE_DEVICE_CASES
#else
namespace pipelive::testing {

inline std::vector<DeviceCase> device_cases() {
  const auto by_kernel = [](Device&, const std::byte* address) { return accessible(address); };
  return {
      {"host", [] { return std::make_shared<HostDevice>(); }, by_kernel},
      {"fault", [] { return std::make_shared<FaultDevice>(std::make_shared<HostDevice>()); },
       by_kernel},
  };
}

}  // namespace pipelive::testing
#endif
