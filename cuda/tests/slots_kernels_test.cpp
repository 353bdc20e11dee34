// How the slot kernels come into a process that has other work on the GPU.
#include <gtest/gtest.h>

#include <vector>

#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/stream.hpp"
#include "slots_fixture.hpp"

namespace pipelive::cuda {
namespace {

class LoadingKernels : public test::SlotDriverTest {
 protected:
  void load() {
    const SlotKernels loaded(std::make_shared<Kernels>(
        context, [](const KernelFile&, const DeviceLimits&) { return std::vector<std::byte>(4); }));
  }
};

TEST_F(LoadingKernels, BreaksNoCaptureOfAStreamThatWaitsForTheDefaultOne) {
  const CallScope scope(*context);
  StreamHandle blocking = nullptr;
  ASSERT_EQ(context->driver().api().stream_create_with_priority(&blocking, 0, 0), kSuccess);
  call<FakeDriverCapture>("fake_driver_capture")(blocking, 1);
  load();
  EXPECT_EQ(call<FakeDriverCaptures>("fake_driver_captures")(blocking), 1);
  call<FakeDriverCapture>("fake_driver_capture")(blocking, 0);
  EXPECT_EQ(context->driver().api().stream_destroy(blocking), kSuccess);
}

TEST_F(LoadingKernels, WaitsForNothingThatTheDefaultStreamHasToDo) {
  const CallScope scope(*context);
  const DeviceBuffer buffer(context->driver(), 16);
  void* const legacy = kDefaultStream.handle;
  hold(static_cast<StreamHandle>(legacy), true);
  ASSERT_EQ(context->driver().api().memset_d8_async(buffer.pointer(), 0, 16,
                                                    static_cast<StreamHandle>(legacy)),
            kSuccess);
  load();
  EXPECT_EQ(call<FakeDriverPending>("fake_driver_pending")(legacy), 1);
  hold(static_cast<StreamHandle>(legacy), false);
}

}  // namespace
}  // namespace pipelive::cuda
