#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fake_driver.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/slot_kernels.hpp"
#include "slots_emulation.hpp"

namespace pipelive::cuda::test {

/// The stand-in for libcuda with the slot kernels, whose device memory is memory of the host: any
/// plain buffer will do for a layer.
class SlotDriverTest : public ::testing::Test {
 protected:
  SlotDriverTest() : library_(dlopen(PIPELIVE_FAKE_DRIVER, RTLD_NOW)) {
    if (library_ == nullptr) {
      ADD_FAILURE() << dlerror();
      return;
    }
    call<FakeDriverReset>("fake_driver_reset")();
    for (const std::string& name : slot_kernel_names()) {
      call<FakeDriverKernel>("fake_driver_kernel")(name.c_str(), slot_kernel_bytes(name),
                                                   &run_kernel);
    }
    context = std::make_shared<const PrimaryContext>(Driver::open(PIPELIVE_FAKE_DRIVER), 0);
    kernels = std::make_shared<const SlotKernels>(std::make_shared<Kernels>(
        context, [](const KernelFile&, const DeviceLimits&) { return std::vector<std::byte>(4); }));
  }
  ~SlotDriverTest() override {
    EXPECT_STREQ(call<FakeDriverMistakes>("fake_driver_mistakes")(), "");
    kernels.reset();
    context.reset();
    EXPECT_EQ(held(), 0);
    for (const std::string& name : slot_kernel_names()) {
      call<FakeDriverKernel>("fake_driver_kernel")(name.c_str(), 0, nullptr);
    }
    dlclose(library_);
  }

  template <typename Function>
  Function* call(const char* name) {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }
  int held() { return call<FakeDriverHeld>("fake_driver_held")(); }
  std::uint64_t count(const char* symbol) {
    return call<FakeDriverCount>("fake_driver_count")(symbol);
  }
  void hold(StreamHandle stream, bool on) {
    call<FakeDriverHold>("fake_driver_hold")(stream, on ? 1 : 0);
  }
  void fail_nth(const char* symbol, std::uint64_t nth, int result) {
    call<FakeDriverFailNth>("fake_driver_fail_nth")(symbol, nth, result);
  }

  template <typename Call>
  static std::pair<ErrorCode, std::string> error_of(Call&& call) {
    try {
      call();
    } catch (const Error& error) {
      return {error.code(), error.what()};
    }
    ADD_FAILURE() << "no error was raised";
    return {};
  }

  std::shared_ptr<const PrimaryContext> context;
  std::shared_ptr<const SlotKernels> kernels;

 private:
  static void run_kernel(const char* name, unsigned grid, unsigned block, const void* parameter) {
    void* parameters[] = {const_cast<void*>(parameter)};
    EXPECT_TRUE(emulate_slot_kernel(name, grid, block, parameters)) << name;
  }

  void* library_;
};

inline Deadline soon() {
  return Deadline::after_seconds(30);
}
inline Deadline shortly() {
  return Deadline::after_seconds(0.02);
}

}  // namespace pipelive::cuda::test
