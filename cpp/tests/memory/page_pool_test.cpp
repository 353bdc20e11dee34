#include "pipelive/memory/page_pool.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <thread>

#include "device/device_cases.hpp"
#include "pipelive/memory/arena.hpp"

namespace pipelive {
namespace {

class PagePoolTest : public testing::DeviceTest {
 protected:
  std::shared_ptr<PagePool> make(std::size_t pages, std::size_t ahead = 0) {
    return PagePool::create(fault_, {page_, pages * page_, ahead});
  }
  /// Pages that hold zeros, whatever new ones hold.
  void make_clean(PagePool& pool, std::size_t pages) {
    pool.prepare(pages);
    pool.wait_prepared(Deadline::after_seconds(20));
    pool.prepare(0);
  }
};

INSTANTIATE_TEST_SUITE_P(Devices, PagePoolTest, ::testing::ValuesIn(testing::device_cases()),
                         testing::case_name);

Deadline soon() {
  return Deadline::after_seconds(20);
}

TEST_P(PagePoolTest, RefusesOptionsOutOfRange) {
  EXPECT_ERROR(invalid_argument, "page_bytes is 100", (void)PagePool::create(fault_, {100, page_}));
  EXPECT_ERROR(invalid_argument, "page_bytes is " + std::to_string(3 * page_),
               (void)PagePool::create(fault_, {3 * page_, 8 * page_}));
  EXPECT_ERROR(invalid_argument, "budget is " + std::to_string(page_ - 1),
               (void)PagePool::create(fault_, {page_, page_ - 1}));
  EXPECT_ERROR(invalid_argument, "device is null", (void)PagePool::create(nullptr, {page_, page_}));
}

TEST_P(PagePoolTest, HoldsToItsBudgetAndReusesPages) {
  const auto pool = make(4);
  EXPECT_EQ(pool->budget_bytes(), 4 * page_);
  PageLease first = pool->take(3);
  EXPECT_ERROR(over_budget, "2 more pages", (void)pool->take(2));
  EXPECT_CODE(over_budget, pool->check_fits(2));
  pool->check_fits(1);
  const std::set<PageHandle> handles(first.pages().begin(), first.pages().end());
  first.give_back();
  EXPECT_EQ(pool->stats().used_bytes, 0u);
  EXPECT_EQ(pool->stats().free_bytes, 3 * page_);
  EXPECT_EQ(device_->usage().page_bytes, 3 * page_);
  const PageLease second = pool->take(3);
  EXPECT_EQ(std::set<PageHandle>(second.pages().begin(), second.pages().end()), handles);
  const PagePoolStats stats = pool->stats();
  EXPECT_EQ(stats.pages_created, 3u);
  EXPECT_EQ(stats.pages_reused, 3u);
  EXPECT_EQ(stats.peak_used_bytes, 3 * page_);
  EXPECT_EQ(stats.peak_held_bytes, 3 * page_);
}

TEST_P(PagePoolTest, NeverHoldsMoreThanItsBudgetWhenPagesAreSplit) {
  const auto pool = make(4);
  PageLease lease = pool->take(4);
  PageLease rest = lease.split(1);
  EXPECT_EQ(lease.size(), 1u);
  EXPECT_EQ(rest.size(), 3u);
  EXPECT_TRUE(lease.split(5).empty());
  rest.give_back();
  rest.give_back();
  EXPECT_EQ(pool->stats().used_bytes, page_);
  lease = pool->take(3);
  EXPECT_EQ(pool->stats().used_bytes, 3 * page_);
  EXPECT_LE(pool->stats().held_bytes, pool->budget_bytes());
}

TEST_P(PagePoolTest, KnowsWhichPagesHoldZeros) {
  const auto pool = make(4);
  EXPECT_EQ(pool->take(1).dirty(0), !device_->info().zeroed_pages);
  make_clean(*pool, 4);
  PageLease lease = pool->take(2);
  EXPECT_FALSE(lease.dirty(0));
  lease.mark_dirty();
  lease.give_back();
  // Somebody who does not care gets the used pages, so that the zeros stay for who does.
  EXPECT_TRUE(pool->take(1, PagePool::Prefer::dirty).dirty(0));
  PageLease mixed = pool->take(3, PagePool::Prefer::clean);
  EXPECT_EQ(mixed.size(), 3u);
  EXPECT_EQ(mixed.dirty(0) + mixed.dirty(1) + mixed.dirty(2), 1);
  EXPECT_TRUE(pool->take(1).dirty(0));
  // Pages that nobody wrote to stay clean.
  mixed.give_back();
  EXPECT_EQ(pool->stats().prepared_bytes, 2 * page_);
}

TEST_P(PagePoolTest, TrimReturnsFreePages) {
  const auto pool = make(8);
  PageLease lease = pool->take(6);
  PageLease kept = lease.split(2);
  lease.give_back();
  EXPECT_EQ(pool->trim(page_), page_);
  EXPECT_EQ(device_->usage().page_bytes, 5 * page_);
  EXPECT_EQ(pool->trim(), page_);
  EXPECT_EQ(pool->trim(), 0u);
  EXPECT_EQ(device_->usage().page_bytes, 4 * page_);
}

TEST_P(PagePoolTest, FailuresOfTheDeviceChangeNothing) {
  const auto pool = make(8);
  pool->take(2).give_back();
  fault_->fail(DeviceCall::create_pages, 1);
  EXPECT_CODE(device, (void)pool->take(5));
  EXPECT_EQ(pool->stats().used_bytes, 0u);
  EXPECT_EQ(pool->stats().free_bytes, 2 * page_);
  fault_->fail(DeviceCall::destroy_pages, 1);
  EXPECT_CODE(device, pool->trim());
  EXPECT_EQ(pool->stats().free_bytes, 2 * page_);
  EXPECT_EQ(pool->take(8).size(), 8u);
}

TEST_P(PagePoolTest, PreparesPagesInTheBackground) {
  const auto pool = make(16, 6);
  pool->wait_prepared(soon());
  EXPECT_EQ(pool->stats().prepared_bytes, 6 * page_);
  const std::uint64_t calls = fault_->calls(DeviceCall::create_pages);
  {
    const PageLease lease = pool->take(6);
    // What was prepared did not have to be created.
    EXPECT_EQ(pool->stats().pages_reused, 6u);
    pool->wait_prepared(soon());
    EXPECT_EQ(pool->stats().prepared_bytes, 6 * page_);
    EXPECT_GT(fault_->calls(DeviceCall::create_pages), calls);
  }
  pool->prepare(0);
}

TEST_P(PagePoolTest, PreparationStopsAtTheBudget) {
  const auto pool = make(4);
  const PageLease lease = pool->take(3);
  pool->prepare(4);
  pool->wait_prepared(soon());
  EXPECT_EQ(pool->stats().prepared_bytes, page_);
  EXPECT_LE(pool->stats().peak_held_bytes, pool->budget_bytes());
  EXPECT_CODE(over_budget, pool->prepare(5));
}

TEST_P(PagePoolTest, PreparationScrubsPagesKeptForReuse) {
  const auto pool = make(4);
  {
    Arena arena(pool, 4 * page_);
    arena.map(0, 4 * page_);
    fault_->fill(arena.base(), 0x7F, 4 * page_);
    testing::finish(*fault_);
  }
  EXPECT_EQ(pool->stats().prepared_bytes, 0u);
  pool->prepare(4);
  pool->wait_prepared(soon());
  EXPECT_EQ(pool->stats().prepared_bytes, 4 * page_);
  Arena arena(pool, 4 * page_);
  arena.map(0, 4 * page_);
  EXPECT_EQ(testing::read(*fault_, arena.base(), 4 * page_), std::vector<std::byte>(4 * page_));
}

TEST_P(PagePoolTest, PreparationSurvivesARefusal) {
  for (const DeviceCall call : {DeviceCall::create_pages, DeviceCall::reserve, DeviceCall::map,
                                DeviceCall::fill, DeviceCall::record, DeviceCall::unmap}) {
    const auto pool = make(4);
    if (call != DeviceCall::create_pages) {
      PageLease used = pool->take(2);
      used.mark_dirty();
    }
    fault_->fail(call, 1);
    pool->prepare(3);
    pool->wait_prepared(soon());
    EXPECT_EQ(pool->stats().prepare_failures, 1u) << to_string(call);
    EXPECT_EQ(pool->stats().used_bytes, 0u);
    pool->prepare(3);
    pool->wait_prepared(soon());
    EXPECT_EQ(pool->stats().prepared_bytes, 3 * page_) << to_string(call);
    EXPECT_EQ(pool->take(4).size(), 4u);
  }
}

TEST_P(PagePoolTest, ClosingReturnsPagesAsTheyComeBack) {
  const auto pool = make(4, 1);
  PageLease lease = pool->take(2);
  pool->close();
  EXPECT_TRUE(pool->closed());
  EXPECT_CODE(closed, (void)pool->take(1));
  EXPECT_CODE(closed, pool->prepare(1));
  EXPECT_EQ(device_->usage().page_bytes, 2 * page_);
  lease.give_back();
  EXPECT_EQ(device_->usage().page_bytes, 0u);
  pool->close();
}

TEST_P(PagePoolTest, ALeaseOutlivesTheHandleOfItsPool) {
  PageLease lease = make(2)->take(2);
  EXPECT_EQ(device_->usage().page_bytes, 2 * page_);
  lease.give_back();
  EXPECT_EQ(device_->usage().page_bytes, 0u);
}

TEST_P(PagePoolTest, ThreadsShareTheBudget) {
  const auto pool = make(32, 4);
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < 4; ++number) {
    threads.emplace_back([&pool, number] {
      for (std::size_t round = 0; round < 200; ++round) {
        PageLease lease = pool->take((number + round) % 8 + 1);
        EXPECT_LE(pool->stats().held_bytes, pool->budget_bytes());
        lease.mark_dirty();
        if (round % 16 == 0) pool->trim();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(pool->stats().peak_held_bytes, pool->budget_bytes());
  EXPECT_EQ(pool->stats().used_bytes, 0u);
}

}  // namespace
}  // namespace pipelive
