// What a CUDA device promises beyond the contract of devices, and pools on it; all of it on the
// fake driver. What is about moves and captures is in device_moves_test.cpp.
#include <gmock/gmock.h>

#include <future>
#include <thread>

#include "cuda_device_fixture.hpp"

namespace pipelive::cuda {
namespace {

TEST_F(CudaDeviceTest, SaysWhatItIs) {
  fake_.devices(2);
  CudaDevice second(1, PIPELIVE_FAKE_DRIVER);
  EXPECT_EQ(second.info().name, "cuda:1");
  EXPECT_EQ(second.info().kind, DeviceKind::cuda);
  EXPECT_EQ(second.info().index, 1);
  EXPECT_EQ(second.info().page_granularity, kCudaPage);
  EXPECT_FALSE(second.info().zeroed_pages);
  EXPECT_TRUE(second.exportable());
  EXPECT_TRUE(second.rdma());
  EXPECT_EQ(second.memory().total, std::size_t{4} << 30);
}

TEST_F(CudaDeviceTest, SaysWhatIsMissing) {
  EXPECT_ERROR(device, "libnot_there.so.7", CudaDevice(0, "libnot_there.so.7"));
  EXPECT_ERROR(device, "lacks cuLaunchKernel", CudaDevice(0, PIPELIVE_FAKE_DRIVER_OLD));
  EXPECT_ERROR(invalid_argument, "device is 1", CudaDevice(1, PIPELIVE_FAKE_DRIVER));
  fake_.attribute(DeviceAttribute::virtual_memory_supported, 0);
  EXPECT_ERROR(device, "lacks virtual memory management", CudaDevice(0, PIPELIVE_FAKE_DRIVER));
}

TEST_F(CudaDeviceTest, AsksForNoMoreThanTheDriverGives) {
  // The driver says that it can, and then refuses.
  fake_.fail("cuMemCreate", 1, kNotSupported);
  {
    const CudaDevice device(0, PIPELIVE_FAKE_DRIVER);
    EXPECT_FALSE(device.rdma());
    EXPECT_TRUE(device.exportable());
  }
  fake_.attribute(DeviceAttribute::rdma_with_vmm_supported, 0);
  fake_.fail("cuMemCreate", 1, kNotPermitted);
  CudaDevice device(0, PIPELIVE_FAKE_DRIVER);
  EXPECT_FALSE(device.exportable());
  const auto pages = device.create_pages(kCudaPage, 1);
  EXPECT_ERROR(device, "cannot export", (void)device.export_page(kCudaPage, pages[0]));
  device.destroy_pages(kCudaPage, pages);
}

TEST_F(CudaDeviceTest, OneAccessCallAndOneUnmapPerRun) {
  std::byte* base = device().reserve(8 * kCudaPage, kCudaPage);
  const auto pages = device().create_pages(kCudaPage, 8);
  device().map(base, kCudaPage, pages);
  EXPECT_EQ(fake_.count("cuMemMap"), 8u);
  EXPECT_EQ(fake_.count("cuMemSetAccess"), 1u);
  device().unmap(base, 8 * kCudaPage);
  EXPECT_EQ(fake_.count("cuMemUnmap"), 1u);
  device().destroy_pages(kCudaPage, pages);
  device().release(base, 8 * kCudaPage);
}

TEST_F(CudaDeviceTest, OnlyWholePagesAreUnmapped) {
  std::byte* base = device().reserve(8 * kCudaPage, kCudaPage);
  const auto pages = device().create_pages(2 * kCudaPage, 2);
  device().map(base, 2 * kCudaPage, pages);
  EXPECT_CODE(invalid_argument, device().unmap(base + kCudaPage, kCudaPage));
  EXPECT_CODE(invalid_argument, device().unmap(base, kCudaPage));
  EXPECT_CODE(invalid_argument, device().unmap(base, 3 * kCudaPage));
  EXPECT_ERROR(invalid_argument, "is mapped", device().destroy_pages(2 * kCudaPage, pages));
  // Of another size than they were made.
  EXPECT_CODE(invalid_argument, device().map(base + 4 * kCudaPage, kCudaPage, pages));
  device().unmap(base + 2 * kCudaPage, 2 * kCudaPage);
  device().release(base, 8 * kCudaPage);
  device().destroy_pages(2 * kCudaPage, pages);
}

// Each driver call of each operation fails once; everything is as before.
TEST_F(CudaDeviceTest, EveryOperationIsTransactional) {
  std::byte* base = device().reserve(8 * kCudaPage, kCudaPage);
  const auto pages = device().create_pages(kCudaPage, 4);
  device().map(base, kCudaPage, std::span(pages).first(2));
  const auto values = pattern(2 * kCudaPage, 3);
  write(device(), base, values);
  const DeviceUsage before = device().usage();
  const int held = fake_.held();
  const auto fails = [&](const char* call, std::uint64_t nth, const std::function<void()>& action) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, std::string(call));
    fake_.fail(call, nth, kNotPermitted);
    EXPECT_CODE(device, action());
    fake_.fail(call, 0, 0);
    EXPECT_EQ(device().usage(), before);
    EXPECT_EQ(read(device(), base, 2 * kCudaPage), values);
    EXPECT_EQ(fake_.held(), held);
  };
  fails("cuMemAddressReserve", 1, [&] { (void)device().reserve(kCudaPage, kCudaPage); });
  for (const std::uint64_t nth : {1, 3}) {
    fails("cuMemCreate", nth, [&] { (void)device().create_pages(kCudaPage, 3); });
  }
  for (const std::uint64_t nth : {1, 2}) {
    fails("cuMemMap", nth,
          [&] { device().map(base + 4 * kCudaPage, kCudaPage, std::span(pages).last(2)); });
  }
  fails("cuMemSetAccess", 1,
        [&] { device().map(base + 4 * kCudaPage, kCudaPage, std::span(pages).last(2)); });
  fails("cuMemUnmap", 1, [&] { device().unmap(base, 2 * kCudaPage); });
  for (const std::uint64_t nth : {1, 2}) {
    fails("cuMemRelease", nth,
          [&] { device().destroy_pages(kCudaPage, std::span(pages).last(2)); });
  }
  fails("cuMemExportToShareableHandle", 1,
        [&] { (void)device().export_page(kCudaPage, pages[0]); });
  const ExportedPages exported = device().export_page(kCudaPage, pages[0]);
  for (const char* call :
       {"cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"}) {
    fails(call, 1, [&] { (void)device().import_pages(exported); });
  }
  for (const char* call : {"cuCtxPushCurrent", "cuMemcpyAsync"}) {
    fails(call, 1, [&] { device().copy(base, base + kCudaPage, 5); });
  }
  fails("cuEventRecord", 1, [&] { (void)device().record(); });
  device().unmap(base, 2 * kCudaPage);
  device().destroy_pages(kCudaPage, pages);
  device().release(base, 8 * kCudaPage);
}

TEST_F(CudaDeviceTest, NoMemoryIsSaidInNumbers) {
  EXPECT_ERROR(out_of_memory, "2048 pages", (void)device().create_pages(2 * kCudaPage, 2048));
  fake_.fail("cuMemCreate", 2, kOutOfMemory);
  EXPECT_ERROR(out_of_memory, "on cuda:0", (void)device().create_pages(kCudaPage, 2));
  EXPECT_EQ(device().usage(), DeviceUsage{});
}

// Others in the process must not find that there is no memory because we tried.
TEST_F(CudaDeviceTest, WhatDoesNotFitIsRefusedWithoutTakingWhatIsThere) {
  constexpr std::size_t kPages = 64;
  fake_.memory(kPages * kCudaPage);
  const auto pages = device().create_pages(kCudaPage, kPages / 2);
  const std::uint64_t free = fake_.lowest_free();
  EXPECT_EQ(free, kPages / 2 * kCudaPage);
  EXPECT_ERROR(out_of_memory, std::to_string(free) + " bytes free",
               (void)device().create_pages(kCudaPage, kPages / 2 + 1));
  EXPECT_EQ(fake_.lowest_free(), free);
  device().destroy_pages(kCudaPage, pages);
}

TEST_F(CudaDeviceTest, AFewPagesAreMadeWithoutAskingForWhatIsFree) {
  (void)device();
  const std::uint64_t asked = fake_.count("cuMemGetInfo");
  device().destroy_pages(kCudaPage, device().create_pages(kCudaPage, 2));
  EXPECT_EQ(fake_.count("cuMemGetInfo"), asked);
}

TEST_F(CudaDeviceTest, ReadOnlyPagesOfAPeerCannotBeWritten) {
  const auto pages = device().create_pages(kCudaPage, 1);
  const ExportedPages exported = device().export_page(kCudaPage, pages[0]);
  {
    const auto imported = device().import_run({&exported, 1}, PageAccess::read);
    EXPECT_CODE(device, device().fill(imported->data(), 1, 16));
    EXPECT_FALSE(imported->writable());
    // A driver that knows no read-only mappings.
    fake_.fail("cuMemSetAccess", 1, kNotSupported);
    const auto writable = device().import_run({&exported, 1}, PageAccess::read);
    device().fill(writable->data(), 1, 16);
    EXPECT_TRUE(writable->writable());
  }
  device().destroy_pages(kCudaPage, pages);
}

TEST_F(CudaDeviceTest, LeavesTheThreadsContextAsItWas) {
  const Driver& driver = device().driver();
  ContextHandle current = nullptr;
  EXPECT_EQ(driver.api().ctx_get_current(&current), kSuccess);
  EXPECT_EQ(current, nullptr);
  {
    const ContextScope scope(*device().context());
    device().record()->wait(Deadline::after_seconds(5));
    driver.api().ctx_get_current(&current);
    EXPECT_EQ(current, device().context()->handle());
  }
  CaptureMode mode = CaptureMode::thread_local_;
  driver.api().thread_exchange_capture_mode(&mode);
  EXPECT_EQ(mode, CaptureMode::global);
  driver.api().thread_exchange_capture_mode(&mode);
}

TEST_F(CudaDeviceTest, EventsTellOfTheirStreamAndAreUsedAgain) {
  OwnStream stream(device().context());
  fake_.hold(stream.stream(), true);
  const auto event = device().record(stream.stream());
  EXPECT_FALSE(event->done());
  EXPECT_ERROR(timeout, "deadline", event->wait(Deadline::after_seconds(0.01)));
  // Another stream is not held up, unless it is told to come after.
  device().record()->wait(Deadline::after_seconds(5));
  device().order_after({}, event);
  const auto after = device().record();
  EXPECT_FALSE(after->done());
  auto waiting = std::async(std::launch::async, [&] { after->wait(Deadline::after_seconds(20)); });
  fake_.hold(stream.stream(), false);
  waiting.get();
  EXPECT_TRUE(event->done());
  const std::uint64_t created = fake_.count("cuEventCreate");
  for (int i = 0; i < 10; ++i) (void)device().record(stream.stream());
  EXPECT_LE(fake_.count("cuEventCreate"), created + 1);
}

TEST_F(CudaDeviceTest, AFailedKernelIsTold) {
  std::byte* base = device().reserve(kCudaPage, kCudaPage);
  const auto pages = device().create_pages(kCudaPage, 1);
  device().map(base, kCudaPage, pages);
  fake_.fail("cuEventQuery", 1, kIllegalAddress);
  const auto event = device().record();
  EXPECT_ERROR(device, "cuEventQuery: CUDA_ERROR_ILLEGAL_ADDRESS (700)", (void)event->done());
  device().release(base, kCudaPage);
  device().destroy_pages(kCudaPage, pages);
}

TEST_F(CudaPoolTest, AShrinkWaitsForTheStreamsThatUseThePool) {
  open();
  OwnStream compute(device().context());
  OwnStream unrelated(device().context());
  pool_->residency().note_stream(compute.stream());
  fake_.hold(compute.stream(), true);
  fake_.hold(unrelated.stream(), true);
  // Kernels under way: one on a block that goes, and one of somebody else.
  device().fill(at(1, 29), 1, 64, compute.stream());
  device().fill(at(1, 0), 1, 64, unrelated.stream());
  auto shrunk = std::async(std::launch::async, [&] { pool_->shrink(4, {}, {}); });
  until_events_are_asked();
  EXPECT_EQ(fake_.count("cuMemUnmap"), 0u);
  // Blocks that stay are used as ever meanwhile, those that go are refused.
  {
    const Residency::Use use = pool_->residency().use();
    pool_->residency().check_range(1, 0, 4);
    EXPECT_CODE(not_resident, pool_->residency().check_range(1, 0, 5));
  }
  fake_.hold(compute.stream(), false);
  shrunk.get();
  EXPECT_TRUE(fake_.pending(unrelated.stream()));
  EXPECT_FALSE(testing::accessible(at(1, 29)));
  fake_.hold(unrelated.stream(), false);
  pool_->residency().forget_stream(compute.stream());
}

TEST_F(CudaPoolTest, LoweringWaitsForNothingAndReclaimingForAllThatUsesThePages) {
  open();
  OwnStream compute(device().context());
  OwnStream moving(device().context());
  pool_->residency().note_stream(compute.stream());
  fake_.hold(compute.stream(), true);
  device().fill(at(1, 29), 1, 64, compute.stream());
  pool_->lower(4, std::vector<std::uint64_t>{29}, std::vector<BlockMove>{{29, 2}}, moving.stream());
  EXPECT_EQ(pool_->capacity(), 4u);
  EXPECT_EQ(fake_.count("cuMemUnmap"), 0u);
  EXPECT_TRUE(fake_.pending(compute.stream()));
  // The copies come behind what the pool's users have begun; their stream is no user itself.
  fake_.hold(moving.stream(), true);
  fake_.hold(compute.stream(), false);
  auto reclaimed = std::async(std::launch::async, [&] { pool_->reclaim(); });
  until_events_are_asked();
  EXPECT_EQ(fake_.count("cuMemUnmap"), 0u);
  fake_.hold(moving.stream(), false);
  reclaimed.get();
  EXPECT_FALSE(testing::accessible(at(1, 29)));
  EXPECT_EQ(read(device(), at(1, 2), 64), std::vector<std::byte>(64, std::byte{1}));
  pool_->residency().forget_stream(compute.stream());
}

TEST_F(CudaPoolTest, TheDefaultStreamIsWaitedForUnasked) {
  open();
  const auto drop = [&] { pool_->drop_layers(std::vector<std::uint32_t>{1}); };
  fake_.hold(kDefaultStream, true);
  device().fill(at(1, 29), 1, 64, kDefaultStream);
  auto dropped = std::async(std::launch::async, drop);
  until_events_are_asked();
  EXPECT_EQ(fake_.count("cuMemUnmap"), 0u);
  fake_.hold(kDefaultStream, false);
  dropped.get();
  EXPECT_FALSE(testing::accessible(at(1, 0)));
}

// The shared page gives way in two calls, and between them there is nothing behind a hole.
TEST_F(CudaPoolTest, WhatReplacesTheScratchPageWaitsForTheStreamsThatUseThePool) {
  open(HolePolicy::scratch);
  pool_->drop_layers(std::vector<std::uint32_t>{1});
  OwnStream compute(device().context());
  pool_->residency().note_stream(compute.stream());
  for (const bool layers : {false, true}) {
    fake_.hold(compute.stream(), true);
    device().fill(at(layers ? 1 : 0, 39), 1, 64, compute.stream());
    const std::uint64_t unmapped = fake_.count("cuMemUnmap");
    const std::uint64_t asked = fake_.count("cuEventQuery");
    auto changed = std::async(std::launch::async, [&] {
      layers ? pool_->add_layers(std::vector<std::uint32_t>{1}) : pool_->grow(40);
    });
    const Deadline deadline = Deadline::after_seconds(5);
    while (fake_.count("cuEventQuery") < asked + 5 && !deadline.passed()) {
      std::this_thread::yield();
    }
    EXPECT_TRUE(fake_.pending(compute.stream()));
    EXPECT_EQ(fake_.count("cuMemUnmap"), unmapped);
    fake_.hold(compute.stream(), false);
    changed.get();
    EXPECT_GT(fake_.count("cuMemUnmap"), unmapped);
  }
  EXPECT_EQ(pool_->capacity(), 40u);
  const std::vector<std::byte> zeros(spec_.block_bytes());
  EXPECT_EQ(read(device(), at(1, 39), spec_.block_bytes()), zeros);
  pool_->residency().forget_stream(compute.stream());
}

TEST_F(CudaPoolTest, AConsumerComesAfterTheNotedStreams) {
  open();
  OwnStream producer(device().context());
  OwnStream consumer(device().context());
  pool_->residency().note_stream(producer.stream());
  fake_.hold(producer.stream(), true);
  device().fill(at(0, 1), 9, 64, producer.stream());
  pool_->order_consumer(consumer.stream());
  EXPECT_FALSE(device().record(consumer.stream())->done());
  fake_.hold(producer.stream(), false);
  EXPECT_TRUE(device().record(consumer.stream())->done());
  pool_->residency().forget_stream(producer.stream());
}

TEST_F(CudaPoolTest, AScrubWaitsForNobodyElse) {
  open();
  OwnStream compute(device().context());
  pool_->residency().note_stream(compute.stream());
  fake_.hold(compute.stream(), true);
  device().fill(at(0, 0), 1, 64, compute.stream());
  pool_->grow(40);
  EXPECT_TRUE(fake_.pending(compute.stream()));
  EXPECT_EQ(fake_.count("cuCtxSynchronize"), 0u);
  EXPECT_EQ(fake_.count("cuStreamSynchronize"), 0u);
  const std::vector<std::byte> zeros(spec_.block_bytes());
  EXPECT_EQ(read(device(), at(1, 39), spec_.block_bytes()), zeros);
  fake_.hold(compute.stream(), false);
  pool_->residency().forget_stream(compute.stream());
}

TEST_F(CudaPoolTest, DestructionWaitsForWorkUnderWay) {
  open();
  fake_.hold(kDefaultStream, true);
  device().fill(at(0, 0), 1, 64, kDefaultStream);
  auto gone = std::async(std::launch::async, [&] { pool_.reset(); });
  until_events_are_asked();
  EXPECT_EQ(fake_.count("cuMemUnmap"), 0u);
  fake_.hold(kDefaultStream, false);
  gone.get();
  EXPECT_EQ(pages_->stats().used_bytes, 0u);
}

}  // namespace
}  // namespace pipelive::cuda
