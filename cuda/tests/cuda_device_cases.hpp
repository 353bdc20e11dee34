#pragma once

// The devices of the contract suites here: a CUDA device on the fake driver, and the GPU itself.

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "device/device_cases.hpp"
#include "fake_driver.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::testing {

/// What the fake driver offers besides the driver's entry points.
class FakeDriver {
 public:
  FakeDriver() : library_(dlopen(PIPELIVE_FAKE_DRIVER, RTLD_NOW)) {
    if (library_ == nullptr) throw Error(ErrorCode::device, dlerror());
  }

  template <typename Function>
  [[nodiscard]] Function* symbol(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }
  void reset(std::size_t granularity = std::size_t{2} << 20) const {
    symbol<FakeDriverReset>("fake_driver_reset")();
    symbol<FakeDriverGranularity>("fake_driver_granularity")(granularity);
  }
  void fail(const char* call, std::uint64_t nth, int result) const {
    symbol<FakeDriverFailNth>("fake_driver_fail_nth")(call, nth, result);
  }
  [[nodiscard]] std::uint64_t count(const char* call) const {
    return symbol<FakeDriverCount>("fake_driver_count")(call);
  }
  void hold(Stream stream, bool held) const {
    symbol<FakeDriverHold>("fake_driver_hold")(stream.handle, held ? 1 : 0);
  }
  [[nodiscard]] bool pending(Stream stream) const {
    return symbol<FakeDriverPending>("fake_driver_pending")(stream.handle) != 0;
  }
  void capture(Stream stream, bool on) const {
    symbol<FakeDriverCapture>("fake_driver_capture")(stream.handle, on ? 1 : 0);
  }
  /// Whether the stream is in a capture that nothing has broken.
  [[nodiscard]] bool captures(Stream stream) const {
    return symbol<FakeDriverCaptures>("fake_driver_captures")(stream.handle) != 0;
  }
  void attribute(cuda::DeviceAttribute which, int value) const {
    symbol<FakeDriverAttribute>("fake_driver_attribute")(static_cast<int>(which), value);
  }
  void memory(std::uint64_t bytes) const { symbol<FakeDriverMemory>("fake_driver_memory")(bytes); }
  [[nodiscard]] std::uint64_t lowest_free(int device = 0) const {
    return symbol<FakeDriverLowestFree>("fake_driver_lowest_free")(device);
  }
  void devices(int count) const { symbol<FakeDriverDevices>("fake_driver_devices")(count); }
  [[nodiscard]] int held() const { return symbol<FakeDriverHeld>("fake_driver_held")(); }
  [[nodiscard]] std::string mistakes() const {
    return symbol<FakeDriverMistakes>("fake_driver_mistakes")();
  }

 private:
  void* library_;  // stays open: code of it may be running in other threads
};

/// Asked of the driver, since the host cannot look.
inline bool mapped_on_device(Device& device, const std::byte* address) {
  auto& cuda_device = dynamic_cast<cuda::CudaDevice&>(device);
  const cuda::CallScope scope(*cuda_device.context());
  int mapped = 0;
  const cuda::Result result = cuda_device.driver().api().pointer_get_attribute(
      &mapped, cuda::PointerAttribute::mapped, reinterpret_cast<std::uintptr_t>(address));
  return result == cuda::kSuccess && mapped != 0;
}

inline std::vector<DeviceCase> device_cases() {
  DeviceCase fake;
  fake.name = "cuda_fake";
  fake.make = [] {
    FakeDriver().reset(kPage);
    return std::make_shared<cuda::CudaDevice>(0, PIPELIVE_FAKE_DRIVER);
  };
  fake.accessible = [](Device& device, const std::byte* address) {
    const bool by_kernel = accessible(address);
    EXPECT_EQ(by_kernel, mapped_on_device(device, address));
    return by_kernel;
  };
  fake.finish = [] {
    EXPECT_EQ(FakeDriver().held(), 0);
    EXPECT_EQ(FakeDriver().mistakes(), "");
  };
  DeviceCase real;
  real.name = "cuda";
  real.make = [] { return std::make_shared<cuda::CudaDevice>(0); };
  real.accessible = mapped_on_device;
  return {fake, real};
}

}  // namespace pipelive::testing
