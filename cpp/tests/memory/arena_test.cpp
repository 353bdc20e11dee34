#include "pipelive/memory/arena.hpp"

#include <gtest/gtest.h>

#include "device/device_cases.hpp"
#include "device/fault_tools.hpp"

namespace pipelive {
namespace {

using testing::read;
using testing::write;

class ArenaTest : public testing::DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    pool_ = PagePool::create(fault_, {page_, 16 * page_, 0});
  }
  void TearDown() override {
    if (fault_ != nullptr) fault_->disarm();
    pool_.reset();
    DeviceTest::TearDown();
  }
  [[nodiscard]] std::uint64_t used() const { return pool_->stats().used_bytes; }

  std::shared_ptr<PagePool> pool_;
};

INSTANTIATE_TEST_SUITE_P(Devices, ArenaTest, ::testing::ValuesIn(testing::device_cases()),
                         testing::case_name);

TEST_P(ArenaTest, MapsAndUnmapsInPlace) {
  Arena arena(pool_, 7 * page_ + 1);
  EXPECT_EQ(arena.reserved_bytes(), 8 * page_);
  EXPECT_FALSE(arena.is_mapped(0, 1));
  EXPECT_TRUE(arena.is_mapped(0, 0));
  arena.map(page_, page_ + 1);
  EXPECT_EQ(arena.mapped_bytes(), 2 * page_);
  EXPECT_TRUE(arena.is_mapped(page_, 2 * page_));
  EXPECT_FALSE(arena.is_mapped(page_, 2 * page_ + 1));
  EXPECT_FALSE(arena.is_mapped(0, 2 * page_));
  EXPECT_FALSE(arena.is_mapped(7 * page_, 2 * page_));
  write(*device_, arena.base() + page_, testing::pattern(2 * page_, 1));
  arena.map(4 * page_, 4 * page_);
  arena.unmap(2 * page_, page_);
  auto first = testing::pattern(2 * page_, 1);
  first.resize(page_);
  EXPECT_EQ(read(*device_, arena.base() + page_, page_), first);
  EXPECT_FALSE(accessible(arena.base() + 2 * page_));
  EXPECT_EQ(used(), 5 * page_);
}

TEST_P(ArenaTest, WritesAndReadsMappedBytesOnly) {
  Arena arena(pool_, 4 * page_);
  arena.map(page_, 2 * page_);
  const auto bytes = testing::pattern(page_ + 7, 3);
  arena.write(page_ + 5, bytes);
  EXPECT_EQ(read(*device_, arena.base() + page_ + 5, bytes.size()), bytes);
  std::vector<std::byte> back(bytes.size());
  arena.read(page_ + 5, back);
  EXPECT_EQ(back, bytes);
  arena.write(0, {});
  EXPECT_ERROR(not_resident, "write: not all of the 2 bytes",
               arena.write(page_ - 1, {back.data(), 2}));
  EXPECT_ERROR(not_resident, "read: not all of the 2 bytes",
               arena.read(3 * page_ - 1, {back.data(), 2}));
  EXPECT_ERROR(not_resident, "write", arena.write(~std::size_t{0}, {back.data(), 2}));
  EXPECT_EQ(back, bytes);
  arena.close();
  EXPECT_ERROR(closed, "", arena.write(page_, bytes));
}

TEST_P(ArenaTest, RefusesWrongRanges) {
  EXPECT_ERROR(invalid_argument, "reserve_bytes is 0", Arena(pool_, 0));
  Arena arena(pool_, 8 * page_);
  arena.map(2 * page_, page_);
  EXPECT_ERROR(invalid_argument, "offset is 1", arena.map(1, page_));
  EXPECT_ERROR(invalid_argument, "leave the arena", arena.map(7 * page_, 2 * page_));
  EXPECT_ERROR(invalid_argument, "leave the arena", arena.map(0, ~std::size_t{0}));
  EXPECT_ERROR(invalid_argument, "mapped already", arena.map(page_, 3 * page_));
  EXPECT_ERROR(invalid_argument, "no page at offset", arena.unmap(2 * page_, 2 * page_));
  EXPECT_CODE(not_resident, (void)arena.export_page(0));
  const auto other = PagePool::create(device_, {page_, page_, 0});
  EXPECT_ERROR(invalid_argument, "another pool", arena.map(0, other->take(1)));
  EXPECT_EQ(arena.mapped_bytes(), page_);
  EXPECT_EQ(used(), page_);
}

TEST_P(ArenaTest, OverBudgetChangesNothing) {
  Arena arena(pool_, 32 * page_);
  arena.map(0, 10 * page_);
  EXPECT_CODE(over_budget, arena.map(10 * page_, 7 * page_));
  EXPECT_EQ(arena.mapped_bytes(), 10 * page_);
  arena.map(10 * page_, 6 * page_);
}

TEST_P(ArenaTest, PagesPassBetweenUsersWithoutTheSystem) {
  Arena kv(pool_, 16 * page_, {true, nullptr});
  Arena weights(pool_, 16 * page_);
  kv.map(0, 16 * page_);
  write(*device_, kv.base(), testing::pattern(16 * page_, 1));
  kv.unmap(8 * page_, 8 * page_);
  const std::uint64_t created = fault_->calls(DeviceCall::create_pages);
  weights.map(0, 8 * page_);
  write(*device_, weights.base(), std::vector<std::byte>(8 * page_, std::byte{0xFF}));
  weights.unmap(0, 8 * page_);
  kv.map(8 * page_, 8 * page_);
  EXPECT_EQ(fault_->calls(DeviceCall::create_pages), created);
  EXPECT_EQ(fault_->calls(DeviceCall::destroy_pages), 0u);
  // 0xFFFF is a NaN of bfloat16; none of it may show up in KV memory.
  EXPECT_EQ(read(*device_, kv.base() + 8 * page_, 8 * page_), std::vector<std::byte>(8 * page_));
}

TEST_P(ArenaTest, PutBackKeepsTheBytes) {
  Arena arena(pool_, 4 * page_, {true, nullptr});
  arena.map(0, 4 * page_);
  write(*device_, arena.base(), testing::pattern(4 * page_, 9));
  PageLease lease = arena.take_out(page_, 2 * page_);
  EXPECT_EQ(used(), 4 * page_);
  EXPECT_FALSE(accessible(arena.base() + page_));
  arena.put_back(page_, std::move(lease));
  EXPECT_EQ(read(*device_, arena.base(), 4 * page_), testing::pattern(4 * page_, 9));
}

TEST_P(ArenaTest, ScratchStandsBehindHoles) {
  const auto scratch = std::make_shared<ScratchPage>(*pool_);
  {
    Arena arena(pool_, 8 * page_, {true, scratch});
    EXPECT_TRUE(accessible(arena.base()));
    poke(arena.base() + 5 * page_, 7);
    EXPECT_EQ(peek(arena.base()), 7);
    arena.map(0, 4 * page_);
    EXPECT_EQ(peek(arena.base()), 0);
    EXPECT_EQ(peek(arena.base() + 7 * page_), 7);
    arena.unmap(page_, 3 * page_);
    EXPECT_EQ(peek(arena.base() + page_), 7);
    EXPECT_EQ(used(), 2 * page_);
    arena.close();
    EXPECT_FALSE(accessible(arena.base() + 7 * page_));
  }
  EXPECT_EQ(used(), page_);
}

TEST_P(ArenaTest, ClosedArenasRefuseAndKeepTheirAddresses) {
  Arena arena(pool_, 8 * page_);
  arena.map(0, 2 * page_);
  arena.map(4 * page_, 2 * page_);
  arena.close();
  arena.close();
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(device_->usage().reserved_bytes, 8 * page_);
  EXPECT_FALSE(accessible(arena.base()));
  EXPECT_CODE(closed, arena.map(0, page_));
  EXPECT_CODE(closed, arena.unmap(0, page_));
  EXPECT_CODE(closed, (void)arena.export_page(0));
}

TEST_P(ArenaTest, ExportedPagesAreTheArenasOwn) {
  Arena arena(pool_, 4 * page_);
  arena.map(0, 2 * page_);
  const auto imported = device_->import_pages(arena.export_page(page_));
  poke(imported->data() + 3, 9);
  EXPECT_EQ(peek(arena.base() + page_ + 3), 9);
}

// Every device call of an operation fails once; the arena, its pool and the bytes stay as they
// were.
TEST_P(ArenaTest, EveryOperationIsTransactional) {
  for (const bool with_scratch : {false, true}) {
    const auto scratch = with_scratch ? std::make_shared<ScratchPage>(*pool_) : nullptr;
    Arena arena(pool_, 8 * page_, {true, scratch});
    arena.map(0, 3 * page_);
    const auto values = testing::pattern(3 * page_, 4);
    write(*device_, arena.base(), values);
    const auto check = [&] {
      EXPECT_EQ(arena.mapped_bytes(), 3 * page_);
      EXPECT_EQ(used(), (3 + (with_scratch ? 1 : 0)) * page_);
      EXPECT_EQ(device_->usage().mapped_bytes, (with_scratch ? 8 : 3) * page_);
      EXPECT_EQ(read(*device_, arena.base(), 3 * page_), values);
      EXPECT_EQ(accessible(arena.base() + 5 * page_), with_scratch);
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
          arena.map(4 * page_, 3 * page_);
        },
        [&] { arena.unmap(4 * page_, 3 * page_); }, check);
    EXPECT_EQ(failures[DeviceCall::create_pages], 2u);
    EXPECT_EQ(failures[DeviceCall::map], 1u);
    EXPECT_EQ(failures[DeviceCall::fill], 1u);
    EXPECT_EQ(failures[DeviceCall::record], 1u);
    EXPECT_EQ(failures[DeviceCall::unmap], with_scratch ? 1u : 0u);
  }
}

TEST_P(ArenaTest, AnUnmapThatFailsLeavesThePagesMapped) {
  const auto scratch = std::make_shared<ScratchPage>(*pool_);
  Arena arena(pool_, 8 * page_, {true, scratch});
  arena.map(0, 3 * page_);
  const auto values = testing::pattern(3 * page_, 4);
  write(*device_, arena.base(), values);
  PageLease lease;
  const auto failures = testing::fail_each_call(
      *fault_, [&] { lease = arena.take_out(page_, page_); },
      [&] { arena.put_back(page_, std::move(lease)); },
      [&] {
        EXPECT_EQ(arena.mapped_bytes(), 3 * page_);
        EXPECT_EQ(read(*device_, arena.base(), 3 * page_), values);
        EXPECT_EQ(device_->usage().mapped_bytes, 8 * page_);
      });
  EXPECT_EQ(failures.at(DeviceCall::unmap), 1u);
  EXPECT_EQ(failures.at(DeviceCall::map_repeated), 1u);
  EXPECT_EQ(read(*device_, arena.base(), 3 * page_), values);
}

TEST_P(ArenaTest, AConstructorThatFailsLeavesNothing) {
  const auto scratch = std::make_shared<ScratchPage>(*pool_);
  const DeviceUsage before = device_->usage();
  for (const std::uint64_t nth : {1, 2}) {
    fault_->fail_any(nth);
    EXPECT_CODE(device, Arena(pool_, 8 * page_, {true, scratch}));
    EXPECT_EQ(device_->usage(), before);
  }
}

TEST_P(ArenaTest, DestructionSurvivesADeviceThatRefuses) {
  {
    Arena arena(pool_, 4 * page_);
    arena.map(0, 4 * page_);
    fault_->fail(DeviceCall::unmap, 1);
  }
  EXPECT_EQ(used(), 0u);
  EXPECT_EQ(device_->usage().mapped_bytes, 0u);
}

}  // namespace
}  // namespace pipelive
