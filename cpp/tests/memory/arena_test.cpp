#include "pipelive/memory/arena.hpp"

#include <gtest/gtest.h>

#include "device/device_test_tools.hpp"
#include "device/fault_tools.hpp"
#include "pipelive/device/fault_device.hpp"
#include "pipelive/device/host_device.hpp"

namespace pipelive {
namespace {

using testing::accessible;
using testing::kPage;
using testing::read;
using testing::write;

class ArenaTest : public ::testing::Test {
 protected:
  void TearDown() override {
    fault_->disarm();
    pool_.reset();
    EXPECT_EQ(host_->usage(), DeviceUsage{});
  }
  [[nodiscard]] std::uint64_t used() const { return pool_->stats().used_bytes; }

  std::shared_ptr<HostDevice> host_ = std::make_shared<HostDevice>();
  std::shared_ptr<FaultDevice> fault_ = std::make_shared<FaultDevice>(host_);
  std::shared_ptr<PagePool> pool_ = PagePool::create(fault_, {kPage, 16 * kPage, 0});
};

TEST_F(ArenaTest, MapsAndUnmapsInPlace) {
  Arena arena(pool_, 7 * kPage + 1);
  EXPECT_EQ(arena.reserved_bytes(), 8 * kPage);
  EXPECT_FALSE(arena.is_mapped(0, 1));
  EXPECT_TRUE(arena.is_mapped(0, 0));
  arena.map(kPage, kPage + 1);
  EXPECT_EQ(arena.mapped_bytes(), 2 * kPage);
  EXPECT_TRUE(arena.is_mapped(kPage, 2 * kPage));
  EXPECT_FALSE(arena.is_mapped(kPage, 2 * kPage + 1));
  EXPECT_FALSE(arena.is_mapped(0, 2 * kPage));
  EXPECT_FALSE(arena.is_mapped(7 * kPage, 2 * kPage));
  write(*host_, arena.base() + kPage, testing::pattern(2 * kPage, 1));
  arena.map(4 * kPage, 4 * kPage);
  arena.unmap(2 * kPage, kPage);
  auto first = testing::pattern(2 * kPage, 1);
  first.resize(kPage);
  EXPECT_EQ(read(*host_, arena.base() + kPage, kPage), first);
  EXPECT_FALSE(accessible(arena.base() + 2 * kPage));
  EXPECT_EQ(used(), 5 * kPage);
}

TEST_F(ArenaTest, WritesAndReadsMappedBytesOnly) {
  Arena arena(pool_, 4 * kPage);
  arena.map(kPage, 2 * kPage);
  const auto bytes = testing::pattern(kPage + 7, 3);
  arena.write(kPage + 5, bytes);
  EXPECT_EQ(read(*host_, arena.base() + kPage + 5, bytes.size()), bytes);
  std::vector<std::byte> back(bytes.size());
  arena.read(kPage + 5, back);
  EXPECT_EQ(back, bytes);
  arena.write(0, {});
  EXPECT_ERROR(not_resident, "write: not all of the 2 bytes",
               arena.write(kPage - 1, {back.data(), 2}));
  EXPECT_ERROR(not_resident, "read: not all of the 2 bytes",
               arena.read(3 * kPage - 1, {back.data(), 2}));
  EXPECT_ERROR(not_resident, "write", arena.write(~std::size_t{0}, {back.data(), 2}));
  EXPECT_EQ(back, bytes);
  arena.close();
  EXPECT_ERROR(closed, "", arena.write(kPage, bytes));
}

TEST_F(ArenaTest, RefusesWrongRanges) {
  EXPECT_ERROR(invalid_argument, "reserve_bytes is 0", Arena(pool_, 0));
  Arena arena(pool_, 8 * kPage);
  arena.map(2 * kPage, kPage);
  EXPECT_ERROR(invalid_argument, "offset is 1", arena.map(1, kPage));
  EXPECT_ERROR(invalid_argument, "leave the arena", arena.map(7 * kPage, 2 * kPage));
  EXPECT_ERROR(invalid_argument, "leave the arena", arena.map(0, ~std::size_t{0}));
  EXPECT_ERROR(invalid_argument, "mapped already", arena.map(kPage, 3 * kPage));
  EXPECT_ERROR(invalid_argument, "no page at offset", arena.unmap(2 * kPage, 2 * kPage));
  EXPECT_CODE(not_resident, (void)arena.export_page(0));
  const auto other = PagePool::create(host_, {kPage, kPage, 0});
  EXPECT_ERROR(invalid_argument, "another pool", arena.map(0, other->take(1)));
  EXPECT_EQ(arena.mapped_bytes(), kPage);
  EXPECT_EQ(used(), kPage);
}

TEST_F(ArenaTest, OverBudgetChangesNothing) {
  Arena arena(pool_, 32 * kPage);
  arena.map(0, 10 * kPage);
  EXPECT_CODE(over_budget, arena.map(10 * kPage, 7 * kPage));
  EXPECT_EQ(arena.mapped_bytes(), 10 * kPage);
  arena.map(10 * kPage, 6 * kPage);
}

TEST_F(ArenaTest, PagesPassBetweenUsersWithoutTheSystem) {
  Arena kv(pool_, 16 * kPage, {true, nullptr});
  Arena weights(pool_, 16 * kPage);
  kv.map(0, 16 * kPage);
  write(*host_, kv.base(), testing::pattern(16 * kPage, 1));
  kv.unmap(8 * kPage, 8 * kPage);
  const std::uint64_t created = fault_->calls(DeviceCall::create_pages);
  weights.map(0, 8 * kPage);
  write(*host_, weights.base(), std::vector<std::byte>(8 * kPage, std::byte{0xFF}));
  weights.unmap(0, 8 * kPage);
  kv.map(8 * kPage, 8 * kPage);
  EXPECT_EQ(fault_->calls(DeviceCall::create_pages), created);
  EXPECT_EQ(fault_->calls(DeviceCall::destroy_pages), 0u);
  // 0xFFFF is a NaN of bfloat16; none of it may show up in KV memory.
  EXPECT_EQ(read(*host_, kv.base() + 8 * kPage, 8 * kPage), std::vector<std::byte>(8 * kPage));
}

TEST_F(ArenaTest, PutBackKeepsTheBytes) {
  Arena arena(pool_, 4 * kPage, {true, nullptr});
  arena.map(0, 4 * kPage);
  write(*host_, arena.base(), testing::pattern(4 * kPage, 9));
  PageLease lease = arena.take_out(kPage, 2 * kPage);
  EXPECT_EQ(used(), 4 * kPage);
  EXPECT_FALSE(accessible(arena.base() + kPage));
  arena.put_back(kPage, std::move(lease));
  EXPECT_EQ(read(*host_, arena.base(), 4 * kPage), testing::pattern(4 * kPage, 9));
}

TEST_F(ArenaTest, ScratchStandsBehindHoles) {
  const auto scratch = std::make_shared<ScratchPage>(*pool_);
  {
    Arena arena(pool_, 8 * kPage, {true, scratch});
    EXPECT_TRUE(accessible(arena.base()));
    arena.base()[5 * kPage] = std::byte{7};
    EXPECT_EQ(arena.base()[0], std::byte{7});
    arena.map(0, 4 * kPage);
    EXPECT_EQ(arena.base()[0], std::byte{0});
    EXPECT_EQ(arena.base()[7 * kPage], std::byte{7});
    arena.unmap(kPage, 3 * kPage);
    EXPECT_EQ(arena.base()[kPage], std::byte{7});
    EXPECT_EQ(used(), 2 * kPage);
    arena.close();
    EXPECT_FALSE(accessible(arena.base() + 7 * kPage));
  }
  EXPECT_EQ(used(), kPage);
}

TEST_F(ArenaTest, ClosedArenasRefuseAndKeepTheirAddresses) {
  Arena arena(pool_, 8 * kPage);
  arena.map(0, 2 * kPage);
  arena.map(4 * kPage, 2 * kPage);
  arena.close();
  arena.close();
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(host_->usage().reserved_bytes, 8 * kPage);
  EXPECT_FALSE(accessible(arena.base()));
  EXPECT_CODE(closed, arena.map(0, kPage));
  EXPECT_CODE(closed, arena.unmap(0, kPage));
  EXPECT_CODE(closed, (void)arena.export_page(0));
}

TEST_F(ArenaTest, ExportedPagesAreTheArenasOwn) {
  Arena arena(pool_, 4 * kPage);
  arena.map(0, 2 * kPage);
  const auto imported = host_->import_pages(arena.export_page(kPage));
  imported->data()[3] = std::byte{9};
  EXPECT_EQ(arena.base()[kPage + 3], std::byte{9});
}

// Every device call of an operation fails once; the arena, its pool and the bytes stay as they
// were.
TEST_F(ArenaTest, EveryOperationIsTransactional) {
  for (const bool with_scratch : {false, true}) {
    const auto scratch = with_scratch ? std::make_shared<ScratchPage>(*pool_) : nullptr;
    Arena arena(pool_, 8 * kPage, {true, scratch});
    arena.map(0, 3 * kPage);
    const auto values = testing::pattern(3 * kPage, 4);
    write(*host_, arena.base(), values);
    const auto check = [&] {
      EXPECT_EQ(arena.mapped_bytes(), 3 * kPage);
      EXPECT_EQ(used(), (3 + (with_scratch ? 1 : 0)) * kPage);
      EXPECT_EQ(host_->usage().mapped_bytes, (with_scratch ? 8 : 3) * kPage);
      EXPECT_EQ(read(*host_, arena.base(), 3 * kPage), values);
      EXPECT_EQ(accessible(arena.base() + 5 * kPage), with_scratch);
    };
    // Pages that must be scrubbed when they are mapped, and too few of them.
    const auto make_dirty = [&] {
      pool_->trim();
      PageLease dirty = pool_->take(2);
      dirty.mark_dirty();
    };
    make_dirty();
    auto failures = testing::fail_each_call(
        *fault_,
        [&] {
          make_dirty();
          arena.map(4 * kPage, 3 * kPage);
        },
        [&] { arena.unmap(4 * kPage, 3 * kPage); }, check);
    EXPECT_EQ(failures[DeviceCall::create_pages], 2u);
    EXPECT_EQ(failures[DeviceCall::map], 1u);
    EXPECT_EQ(failures[DeviceCall::fill], 1u);
    EXPECT_EQ(failures[DeviceCall::record], 1u);
    EXPECT_EQ(failures[DeviceCall::unmap], with_scratch ? 1u : 0u);
  }
}

TEST_F(ArenaTest, AnUnmapThatFailsLeavesThePagesMapped) {
  const auto scratch = std::make_shared<ScratchPage>(*pool_);
  Arena arena(pool_, 8 * kPage, {true, scratch});
  arena.map(0, 3 * kPage);
  const auto values = testing::pattern(3 * kPage, 4);
  write(*host_, arena.base(), values);
  PageLease lease;
  const auto failures = testing::fail_each_call(
      *fault_, [&] { lease = arena.take_out(kPage, kPage); },
      [&] { arena.put_back(kPage, std::move(lease)); },
      [&] {
        EXPECT_EQ(arena.mapped_bytes(), 3 * kPage);
        EXPECT_EQ(read(*host_, arena.base(), 3 * kPage), values);
        EXPECT_EQ(host_->usage().mapped_bytes, 8 * kPage);
      });
  EXPECT_EQ(failures.at(DeviceCall::unmap), 1u);
  EXPECT_EQ(failures.at(DeviceCall::map_repeated), 1u);
  EXPECT_EQ(read(*host_, arena.base(), 3 * kPage), values);
}

TEST_F(ArenaTest, AConstructorThatFailsLeavesNothing) {
  const auto scratch = std::make_shared<ScratchPage>(*pool_);
  const DeviceUsage before = host_->usage();
  for (const std::uint64_t nth : {1, 2}) {
    fault_->fail_any(nth);
    EXPECT_CODE(device, Arena(pool_, 8 * kPage, {true, scratch}));
    EXPECT_EQ(host_->usage(), before);
  }
}

TEST_F(ArenaTest, DestructionSurvivesADeviceThatRefuses) {
  {
    Arena arena(pool_, 4 * kPage);
    arena.map(0, 4 * kPage);
    fault_->fail(DeviceCall::unmap, 1);
  }
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(host_->usage().mapped_bytes, 0u);
}

}  // namespace
}  // namespace pipelive
