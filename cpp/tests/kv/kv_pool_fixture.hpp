#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "device/device_cases.hpp"
#include "pipelive/kv/kv_pool.hpp"

namespace pipelive::testing {

/// A pool on a device whose calls can be made to fail, and what its blocks hold.
class KVPoolFixture : public DeviceFixture {
 protected:
  void SetUp() override {
    DeviceFixture::SetUp();
    if (IsSkipped()) return;
    // Blocks of 3 heads * 5 dims * 2 * 4 tokens * 4 bytes = 480 bytes for pages of 4 KiB, and in
    // this proportion for others: they straddle pages.
    spec_.block_size = static_cast<std::uint32_t>(4 * (page_ / 4096));
    pages_ = PagePool::create(fault_, {page_, 200 * page_, 0});
  }
  void TearDown() override {
    if (fault_ != nullptr) fault_->disarm();
    pool_.reset();
    if (pages_ != nullptr) {
      EXPECT_EQ(pages_->stats().used_bytes, 0u);
    }
    pages_.reset();
    DeviceFixture::TearDown();
  }

  void open(const std::vector<std::uint32_t>& layers, std::uint64_t capacity,
            std::uint32_t stack = 1, HolePolicy holes = HolePolicy::fault) {
    KVPoolOptions options;
    options.num_layers = 7;
    options.layers = layers;
    options.max_blocks = 100;
    options.capacity = capacity;
    options.stack = stack;
    options.holes = holes;
    pool_ = KVPool::create(spec_, pages_, options);
  }

  [[nodiscard]] std::byte* at(std::uint32_t layer, std::uint64_t block) const {
    const LayerMemory memory = pool_->layer_memory(layer);
    return memory.base + block * memory.block_stride;
  }
  [[nodiscard]] std::size_t block_bytes() const { return spec_.block_bytes(); }
  [[nodiscard]] std::vector<std::byte> value(std::uint32_t layer, std::uint64_t block) const {
    return pattern(block_bytes(), static_cast<unsigned>(layer * 1000 + block));
  }
  void put(std::uint64_t block) {
    for (const std::uint32_t layer : pool_->layers()) {
      write(*device_, at(layer, block), value(layer, block));
    }
  }
  /// Block `block` holds what was put into `original`, in every layer.
  [[nodiscard]] bool holds(std::uint64_t block, std::uint64_t original) const {
    for (const std::uint32_t layer : pool_->layers()) {
      if (read(*device_, at(layer, block), block_bytes()) != value(layer, original)) {
        return false;
      }
    }
    return true;
  }
  [[nodiscard]] bool is_zero(std::uint32_t layer, std::uint64_t block) const {
    return read(*device_, at(layer, block), block_bytes()) == std::vector<std::byte>(block_bytes());
  }

  KVSpec spec_{3, 5, DType::float32, 4, BlockOrder::hnd};
  std::shared_ptr<PagePool> pages_;
  std::shared_ptr<KVPool> pool_;
};

}  // namespace pipelive::testing
