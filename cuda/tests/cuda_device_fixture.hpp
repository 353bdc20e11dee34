#pragma once

// A CUDA device on the fake driver, and pools on it, for tests of what the contracts do not say.

#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "cuda_device_cases.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/kv/kv_pool.hpp"

namespace pipelive::cuda {

using testing::FakeDriver;
using testing::pattern;
using testing::read;
using testing::write;

inline constexpr std::size_t kMiB = std::size_t{1} << 20;
inline constexpr std::size_t kCudaPage = 2 * kMiB;

class CudaDeviceTest : public ::testing::Test {
 protected:
  CudaDeviceTest() { fake_.reset(); }
  void TearDown() override {
    device_.reset();
    EXPECT_EQ(fake_.held(), 0);
    EXPECT_EQ(fake_.mistakes(), "");
  }
  CudaDevice& device() {
    if (device_ == nullptr) device_ = std::make_shared<CudaDevice>(0, PIPELIVE_FAKE_DRIVER);
    return *device_;
  }

  FakeDriver fake_;
  std::shared_ptr<CudaDevice> device_;
};

// Pools on the device: what only a device with streams can show.
class CudaPoolTest : public CudaDeviceTest {
 protected:
  void open(HolePolicy holes = HolePolicy::fault) {
    pages_ = PagePool::create(device_of(), {kCudaPage, 32 * kCudaPage, 0});
    KVPoolOptions options;
    options.num_layers = 2;
    options.layers = {0, 1};
    options.max_blocks = 40;
    options.capacity = 30;
    options.holes = holes;
    pool_ = KVPool::create(spec_, pages_, options);
  }
  std::shared_ptr<CudaDevice> device_of() {
    (void)device();
    return device_;
  }
  void TearDown() override {
    pool_.reset();
    pages_.reset();
    CudaDeviceTest::TearDown();
  }
  /// Returns once somebody waits for an event; a wait that never begins fails the test.
  void until_events_are_asked() const {
    const Deadline deadline = Deadline::after_seconds(10);
    while (fake_.count("cuEventQuery") < 5 && !deadline.passed()) std::this_thread::yield();
    EXPECT_GE(fake_.count("cuEventQuery"), 5u) << "nobody waited for the streams";
  }
  [[nodiscard]] std::byte* at(std::uint32_t layer, std::uint64_t block) const {
    const LayerMemory memory = pool_->layer_memory(layer);
    return memory.base + block * memory.block_stride;
  }

  // Blocks of 512 KiB, four to a page.
  const KVSpec spec_{4, 128, DType::float32, 128, BlockOrder::hnd};
  std::shared_ptr<PagePool> pages_;
  std::shared_ptr<KVPool> pool_;
};

}  // namespace pipelive::cuda
