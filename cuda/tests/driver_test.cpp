#include "pipelive/cuda/driver.hpp"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "fake_driver.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/scale.hpp"

namespace pipelive::cuda {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename Call>
std::pair<ErrorCode, std::string> error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  ADD_FAILURE() << "no error was raised";
  return {};
}

class DriverTest : public ::testing::Test {
 protected:
  DriverTest() : library_(dlopen(PIPELIVE_FAKE_DRIVER, RTLD_NOW)) {
    if (library_ == nullptr) {
      ADD_FAILURE() << dlerror();
      return;
    }
    symbol<FakeDriverReset>("fake_driver_reset")();
  }
  ~DriverTest() override { dlclose(library_); }

  template <typename Function>
  Function* symbol(const char* name) {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }
  void fail(const char* call, int result) {
    symbol<FakeDriverFail>("fake_driver_fail")(call, result);
  }
  int held() { return symbol<FakeDriverHeld>("fake_driver_held")(); }
  std::vector<std::string> calls() {
    const std::string all = symbol<FakeDriverCalls>("fake_driver_calls")();
    std::vector<std::string> result;
    for (std::size_t begin = 0; begin < all.size();) {
      const std::size_t end = all.find('\n', begin);
      result.push_back(all.substr(begin, end - begin));
      begin = end + 1;
    }
    return result;
  }

  std::array<std::byte, 4> image_{};
  std::vector<float> values_{1.0F, -2.0F, 3.5F};

 private:
  void* library_;
};

TEST_F(DriverTest, NamesTheLibraryThatIsMissing) {
  const auto [code, message] = error_of([] { (void)Driver::open("libnot_there.so.7"); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("libnot_there.so.7"));
}

TEST_F(DriverTest, NamesTheSymbolThatIsMissing) {
  const auto [code, message] = error_of([] { (void)Driver::open(PIPELIVE_FAKE_DRIVER_OLD); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("lacks cuLaunchKernel"));
  EXPECT_THAT(message, HasSubstr(PIPELIVE_FAKE_DRIVER_OLD));
}

TEST_F(DriverTest, OpensAndReportsWhatTheDriverSays) {
  const auto driver = Driver::open(PIPELIVE_FAKE_DRIVER);
  EXPECT_EQ(driver->version(), 12080);
  EXPECT_EQ(driver->device_count(), 1);
  EXPECT_EQ(driver->device_name(0), "Fake device");
}

TEST_F(DriverTest, AFailedCallIsNamedWithItsNumber) {
  fail("cuInit", 100);
  const auto [code, message] = error_of([] { (void)Driver::open(PIPELIVE_FAKE_DRIVER); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("cuInit: CUDA_ERROR_NO_DEVICE (100)"));
}

TEST_F(DriverTest, AnErrorThatTheDriverCannotNameKeepsItsNumber) {
  fail("cuInit", 4711);
  const auto [code, message] = error_of([] { (void)Driver::open(PIPELIVE_FAKE_DRIVER); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("cuInit: unknown error (4711)"));
}

TEST_F(DriverTest, ProbeTurnsFailuresIntoReasons) {
  const DriverProbe good = probe_driver(PIPELIVE_FAKE_DRIVER);
  EXPECT_EQ(good.version, 12080);
  EXPECT_EQ(good.device_count, 1);
  EXPECT_EQ(good.problem, "");

  symbol<FakeDriverDevices>("fake_driver_devices")(0);
  const DriverProbe none = probe_driver(PIPELIVE_FAKE_DRIVER);
  EXPECT_EQ(none.version, 12080);
  EXPECT_THAT(none.problem, HasSubstr("no device"));

  const DriverProbe missing = probe_driver("libnot_there.so.7");
  EXPECT_FALSE(missing.version.has_value());
  EXPECT_THAT(missing.problem, HasSubstr("libnot_there.so.7"));
}

TEST_F(DriverTest, ScaleCallsInOrderAndGivesEverythingBack) {
  const auto driver = Driver::open(PIPELIVE_FAKE_DRIVER);
  scale(driver, 0, image_, values_, 2.0F);
  EXPECT_THAT(values_, ElementsAre(2.0F, -4.0F, 7.0F));
  EXPECT_EQ(held(), 0);
  EXPECT_THAT(
      calls(),
      ElementsAre("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
                  "cuCtxPushCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc",
                  "cuMemcpyHtoD", "cuLaunchKernel", "cuStreamSynchronize", "cuMemcpyDtoH",
                  "cuMemFree", "cuModuleUnload", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"));
}

TEST_F(DriverTest, ScaleOfNothingCallsNothing) {
  const auto driver = Driver::open(PIPELIVE_FAKE_DRIVER);
  scale(driver, 0, image_, {}, 2.0F);
  EXPECT_THAT(calls(), ElementsAre("cuInit"));
}

TEST_F(DriverTest, ScaleRefusesADeviceThatIsNotThere) {
  const auto driver = Driver::open(PIPELIVE_FAKE_DRIVER);
  for (const int device : {-1, 1}) {
    const auto [code, message] = error_of([&] { scale(driver, device, image_, values_, 2.0F); });
    EXPECT_EQ(code, ErrorCode::invalid_argument);
    EXPECT_THAT(message, HasSubstr("device is " + std::to_string(device)));
  }
}

TEST_F(DriverTest, WhateverCallFailsNothingStaysHeld) {
  for (const char* call :
       {"cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent",
        "cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc", "cuMemcpyHtoD", "cuLaunchKernel",
        "cuStreamSynchronize", "cuMemcpyDtoH"}) {
    SCOPED_TRACE(call);
    const auto driver = Driver::open(PIPELIVE_FAKE_DRIVER);
    fail(call, 2);
    const auto [code, message] = error_of([&] { scale(driver, 0, image_, values_, 2.0F); });
    EXPECT_EQ(code, ErrorCode::out_of_memory);
    EXPECT_THAT(message, HasSubstr(call));
    EXPECT_EQ(held(), 0);
    EXPECT_THAT(values_, ElementsAre(1.0F, -2.0F, 3.5F));
  }
}

TEST_F(DriverTest, AKernelThatIsMissingIsNamed) {
  const PrimaryContext context(Driver::open(PIPELIVE_FAKE_DRIVER), 0);
  const ContextScope scope(context);
  const Module module(context.driver(), image_);
  const auto [code, message] = error_of([&] { (void)module.function("no_such_kernel"); });
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_THAT(message, HasSubstr("no_such_kernel"));
  EXPECT_THAT(message, HasSubstr("named symbol not found"));
}

TEST_F(DriverTest, EmptyImagesAndBuffersAreRefused) {
  const auto driver = Driver::open(PIPELIVE_FAKE_DRIVER);
  EXPECT_EQ(error_of([&] { Module module(*driver, {}); }).first, ErrorCode::invalid_argument);
  EXPECT_EQ(error_of([&] { DeviceBuffer buffer(*driver, 0); }).first, ErrorCode::invalid_argument);
}

}  // namespace
}  // namespace pipelive::cuda
