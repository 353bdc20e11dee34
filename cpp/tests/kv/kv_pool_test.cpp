#include "pipelive/kv/kv_pool.hpp"

#include <gtest/gtest.h>

#include <future>
#include <thread>

#include "device/fault_tools.hpp"
#include "kv/kv_pool_fixture.hpp"
#include "pipelive/kv/layer_view.hpp"

namespace pipelive {
namespace {

using testing::KVPoolFixture;
using Layers = std::vector<std::uint32_t>;
using Ids = std::vector<std::uint64_t>;
using Moves = std::vector<BlockMove>;

class KVPoolTest : public KVPoolFixture, public ::testing::WithParamInterface<testing::DeviceCase> {
 protected:
  [[nodiscard]] const testing::DeviceCase& device_case() const override { return GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(Devices, KVPoolTest, ::testing::ValuesIn(testing::device_cases()),
                         testing::case_name);

TEST_P(KVPoolTest, ReservesEveryLayerAndMapsWhatIsHeld) {
  open({1, 2}, 20);
  EXPECT_EQ(pool_->layers(), (Layers{1, 2}));
  EXPECT_EQ(pool_->capacity(), 20u);
  // 20 * 480 bytes are 3 pages in each layer.
  EXPECT_EQ(pages_->stats().used_bytes, 6 * page_);
  EXPECT_EQ(pool_->bytes_needed(Layers{1, 2}, 20), 6 * page_);
  EXPECT_TRUE(accessible(at(1, 19)));
  EXPECT_FALSE(accessible(at(1, 99)));
  EXPECT_FALSE(accessible(at(0, 0)));
  EXPECT_NE(at(6, 0), nullptr);
  const KVPoolStats stats = pool_->stats();
  EXPECT_EQ(stats.layers_held, 2u);
  EXPECT_EQ(stats.held_bytes, 6 * page_);
  EXPECT_EQ(stats.resident_bytes, 20u * 2 * block_bytes());
}

TEST_P(KVPoolTest, GrowsAndShrinksInPlace) {
  open({0, 3}, 10);
  std::byte* const address = at(3, 0);
  for (std::uint64_t block = 0; block < 10; ++block) put(block);
  pool_->grow(100);
  EXPECT_EQ(at(3, 0), address);
  for (std::uint64_t block = 0; block < 10; ++block) EXPECT_TRUE(holds(block, block));
  for (std::uint64_t block = 10; block < 100; ++block) EXPECT_TRUE(is_zero(3, block));
  pool_->shrink(5, Ids{0, 1, 4}, {});
  EXPECT_TRUE(holds(4, 4));
  EXPECT_EQ(pages_->stats().used_bytes, 2 * page_);
  EXPECT_FALSE(accessible(address + page_));
  pool_->grow(5);
  pool_->shrink(5, {}, {});
}

TEST_P(KVPoolTest, BlocksThatComeBackHoldZeros) {
  open({0}, 100);
  for (std::uint64_t block = 0; block < 100; ++block) put(block);
  pool_->shrink(3, {}, {});
  pool_->grow(100);
  // Also those that shared the last page with blocks that stayed.
  for (std::uint64_t block = 3; block < 100; ++block) EXPECT_TRUE(is_zero(0, block)) << block;
  for (std::uint64_t block = 0; block < 3; ++block) EXPECT_TRUE(holds(block, block));
  pool_->drop_layers(Layers{0});
  pool_->add_layers(Layers{0, 1});
  EXPECT_TRUE(is_zero(0, 1));
  EXPECT_TRUE(is_zero(1, 99));
}

TEST_P(KVPoolTest, LowersAtOnceAndReclaimsLater) {
  open({0, 3}, 100);
  for (std::uint64_t block = 0; block < 100; ++block) put(block);
  const std::size_t used = pages_->stats().used_bytes;
  pool_->lower(50, Ids{0, 1, 90}, Moves{{90, 2}});
  EXPECT_EQ(pool_->capacity(), 50u);
  EXPECT_CODE(not_resident, pool_->residency().check_range(0, 0, 51));
  EXPECT_TRUE(holds(2, 90));
  pool_->lower(5, Ids{0, 1, 2, 40}, Moves{{40, 3}});
  EXPECT_EQ(pages_->stats().used_bytes, used);
  EXPECT_EQ(pool_->stats().held_bytes, used);
  EXPECT_TRUE(accessible(at(0, 99)));
  pool_->reclaim();
  EXPECT_EQ(pages_->stats().used_bytes, 2 * page_);
  EXPECT_EQ(pool_->stats().held_bytes, 2 * page_);
  EXPECT_FALSE(accessible(at(0, 99)));
  EXPECT_TRUE(holds(3, 40));
  pool_->reclaim();
  EXPECT_ERROR(invalid_argument, "at most the present 5", pool_->lower(6, {}, {}));
}

TEST_P(KVPoolTest, WhatComesAfterLowerTakesThePagesAway) {
  open({0, 3}, 100);
  for (std::uint64_t block = 0; block < 100; ++block) put(block);
  pool_->lower(3, {}, {});
  pool_->grow(60);
  for (std::uint64_t block = 3; block < 60; ++block) EXPECT_TRUE(is_zero(3, block)) << block;
  pool_->lower(3, {}, {});
  pool_->add_layers(Layers{1});
  EXPECT_EQ(pages_->stats().used_bytes, 3 * page_);
  pool_->grow(60);
  pool_->lower(3, {}, {});
  pool_->drop_layers(Layers{0, 1});
  pool_->shrink(2, {}, {});
  EXPECT_EQ(pages_->stats().used_bytes, page_);
}

TEST_P(KVPoolTest, ShrinkMovesBlocksOrSaysWhichAreInTheWay) {
  open({0, 1, 2}, 50);
  for (const std::uint64_t block : {0, 7, 30, 31, 49}) put(block);
  std::string message;
  EXPECT_ERROR(busy, "2 live blocks stand in the way: 30, 49",
               pool_->shrink(10, Ids{0, 7, 30, 31, 49}, Moves{{31, 3}}));
  EXPECT_EQ(pool_->capacity(), 50u);
  pool_->shrink(10, Ids{0, 7, 30, 31, 49}, Moves{{30, 1}, {31, 2}, {49, 9}});
  EXPECT_TRUE(holds(7, 7));
  EXPECT_TRUE(holds(1, 30));
  EXPECT_TRUE(holds(2, 31));
  EXPECT_TRUE(holds(9, 49));
}

TEST_P(KVPoolTest, RefusesWrongMoves) {
  open({0}, 50);
  const Ids live{1, 5, 30};
  const auto shrink = [&](Moves moves) { pool_->shrink(20, live, moves); };
  EXPECT_ERROR(invalid_argument, "block 0 never moves", shrink({{30, 0}}));
  EXPECT_ERROR(invalid_argument, "block 0 never moves", shrink({{0, 4}, {30, 2}}));
  EXPECT_ERROR(invalid_argument, "expected a target below 20", shrink({{30, 20}}));
  EXPECT_ERROR(invalid_argument, "which is live", shrink({{30, 5}}));
  EXPECT_ERROR(invalid_argument, "is not live", shrink({{30, 2}, {31, 3}}));
  EXPECT_ERROR(invalid_argument, "5 is part of another move", shrink({{5, 2}, {30, 5}}));
  EXPECT_ERROR(invalid_argument, "2 is part of another move", shrink({{5, 2}, {30, 2}}));
  EXPECT_ERROR(invalid_argument, "is part of another move", shrink({{30, 2}, {30, 3}}));
  EXPECT_ERROR(invalid_argument, "is part of another move", shrink({{5, 5}, {30, 3}}));
  EXPECT_ERROR(not_resident, "below 50", shrink({{50, 2}}));
  EXPECT_ERROR(not_resident, "live block 77", pool_->shrink(20, Ids{77}, {}));
  EXPECT_ERROR(not_resident, "below 50", pool_->move_blocks(Moves{{60, 2}}));
  EXPECT_ERROR(invalid_argument, "expected a target below 50", pool_->move_blocks(Moves{{2, 60}}));
  EXPECT_EQ(pool_->capacity(), 50u);
}

TEST_P(KVPoolTest, MovesBlocksInAllLayers) {
  open({0, 1, 2, 3}, 50, 2);
  for (std::uint64_t block = 0; block < 20; ++block) put(block);
  pool_->move_blocks(Moves{{3, 40}, {4, 41}, {5, 42}, {19, 30}, {7, 20}});
  for (const auto& [from, to] : Moves{{3, 40}, {4, 41}, {5, 42}, {19, 30}, {7, 20}, {6, 6}}) {
    EXPECT_TRUE(holds(to, from)) << from;
    EXPECT_TRUE(holds(from, from)) << from;
  }
  pool_->move_blocks({});
}

TEST_P(KVPoolTest, RefusesCapacitiesOutOfRange) {
  EXPECT_ERROR(invalid_argument, "capacity is 0", open({0}, 0));
  EXPECT_ERROR(invalid_argument, "capacity is 101", open({0}, 101));
  open({0}, 10);
  EXPECT_ERROR(invalid_argument, "expected at least the present 10", pool_->grow(9));
  EXPECT_ERROR(invalid_argument, "expected at most the present 10", pool_->shrink(11, {}, {}));
  EXPECT_ERROR(invalid_argument, "expected 1 to 100", pool_->grow(101));
  EXPECT_ERROR(invalid_argument, "expected 1 to 100", pool_->shrink(0, {}, {}));
  EXPECT_ERROR(invalid_argument, "layer is 7", (void)pool_->layer_memory(7));
  EXPECT_CODE(invalid_argument, (void)pool_->bytes_needed(Layers{0}, 101));
  EXPECT_CODE(invalid_argument, (void)pool_->bytes_needed(Layers{7}, 1));
}

TEST_P(KVPoolTest, StacksLieSideBySideAndMoveWhole) {
  open({2, 3}, 20, 2);
  const auto block = static_cast<std::ptrdiff_t>(block_bytes());
  EXPECT_EQ(at(3, 0) - at(2, 0), block);
  EXPECT_EQ(at(2, 1) - at(2, 0), 2 * block);
  // The last stack of seven layers holds one.
  EXPECT_EQ(at(6, 1) - at(6, 0), block);
  EXPECT_ERROR(invalid_argument, "stack 0 holds layers 0 to 1", pool_->add_layers(Layers{0}));
  EXPECT_ERROR(invalid_argument, "stack 1 holds layers 2 to 3", pool_->drop_layers(Layers{2}));
  EXPECT_ERROR(invalid_argument, "layer 2 is held already", pool_->add_layers(Layers{2, 3}));
  EXPECT_ERROR(invalid_argument, "layer 0 is not held", pool_->drop_layers(Layers{0, 1}));
  pool_->add_layers(Layers{6, 1, 0});
  EXPECT_EQ(pool_->layers(), (Layers{0, 1, 2, 3, 6}));
  pool_->drop_layers(Layers{6, 3, 2});
  EXPECT_EQ(pool_->layers(), (Layers{0, 1}));
  pool_->drop_layers(Layers{0, 1});
  EXPECT_EQ(pages_->stats().used_bytes, 0u);
  pool_->grow(100);
  pool_->add_layers(Layers{6});
  EXPECT_TRUE(is_zero(6, 99));
}

TEST_P(KVPoolTest, OverBudgetChangesNothing) {
  open({0, 1}, 10);
  put(9);
  // 100 blocks take 12 pages a layer, 10 blocks take 2; 15 pages are left.
  const PageLease rest = pages_->take(181);
  EXPECT_ERROR(over_budget, "20 more pages", pool_->grow(100));
  EXPECT_EQ(pool_->capacity(), 10u);
  pool_->grow(60);
  EXPECT_ERROR(over_budget, "8 more pages", pool_->add_layers(Layers{5}));
  EXPECT_EQ(pool_->layers(), (Layers{0, 1}));
  EXPECT_TRUE(holds(9, 9));
}

TEST_P(KVPoolTest, ScratchPolicyPutsOnePageBehindHoles) {
  open({0, 1}, 9, 1, HolePolicy::scratch);
  EXPECT_TRUE(accessible(at(0, 99)));
  EXPECT_TRUE(accessible(at(5, 50)));
  poke(at(5, 50), 1);
  EXPECT_EQ(pages_->stats().used_bytes, 5 * page_);
  EXPECT_EQ(pool_->stats().held_bytes, 5 * page_);
  EXPECT_EQ(pool_->bytes_needed(Layers{0, 1}, 9), 5 * page_);
  put(8);
  pool_->grow(100);
  EXPECT_TRUE(is_zero(0, 99));
  EXPECT_TRUE(holds(8, 8));
  pool_->shrink(9, Ids{8}, {});
  EXPECT_TRUE(holds(8, 8));
  EXPECT_TRUE(accessible(at(0, 99)));
  EXPECT_ERROR(not_resident, "block 9 of layer 0", pool_->residency().check_range(0, 5, 10));
}

TEST_P(KVPoolTest, KnowsWhatIsResident) {
  open({2, 3}, 20, 2);
  const auto check = [this](std::uint32_t layer, std::vector<std::int32_t> ids) {
    pool_->check_resident<std::int32_t>(layer, ids);
  };
  check(2, {0, 19, 5});
  check(3, {});
  EXPECT_ERROR(not_resident, "block 20 of layer 2", check(2, {0, 20}));
  EXPECT_ERROR(not_resident, "block -1 of layer 2", check(2, {-1}));
  EXPECT_ERROR(not_resident, "layer 0 is not held", check(0, {}));
  EXPECT_ERROR(invalid_argument, "layer is 7", check(7, {0}));
  pool_->check_resident<std::int64_t>(2, std::vector<std::int64_t>{19});
  EXPECT_CODE(not_resident,
              pool_->check_resident<std::int64_t>(2, std::vector<std::int64_t>{1LL << 40}));
  EXPECT_CODE(not_resident, pool_->check_resident<std::uint64_t>(2, Ids{~std::uint64_t{0}}));
  pool_->residency().check_range(2, 19, 20);
  pool_->residency().check_range(2, 50, 50);
  EXPECT_CODE(not_resident, pool_->residency().check_range(2, 19, 21));
  EXPECT_TRUE(pool_->is_resident(19));
  EXPECT_FALSE(pool_->is_resident(20));
  pool_->grow(21);
  check(2, {20});
  pool_->add_layers(Layers{0, 1});
  check(0, {20});
  pool_->drop_layers(Layers{2, 3});
  EXPECT_CODE(not_resident, check(2, {0}));
}

TEST_P(KVPoolTest, ClosedPoolsRefuseAndViewsKeepTheAddresses) {
  open({0}, 10);
  LayerView view(pool_, 0);
  view.check_resident_range(0, 10);
  std::byte* const address = at(0, 0);
  pool_->close();
  pool_->close();
  EXPECT_TRUE(pool_->closed());
  EXPECT_EQ(pages_->stats().used_bytes, 0u);
  EXPECT_CODE(closed, pool_->grow(20));
  EXPECT_CODE(closed, pool_->shrink(5, {}, {}));
  EXPECT_CODE(closed, pool_->add_layers(Layers{1}));
  EXPECT_CODE(closed, pool_->drop_layers(Layers{0}));
  EXPECT_CODE(closed, pool_->move_blocks({}));
  EXPECT_CODE(closed, view.check_resident_range(0, 1));
  pool_.reset();
  // Nobody else can get the addresses while the view lives.
  EXPECT_FALSE(accessible(address));
  EXPECT_GT(device_->usage().reserved_bytes, 0u);
}

TEST_P(KVPoolTest, TakingMemoryAwayWaitsForUses) {
  open({0, 1}, 50);
  Residency::Use use = pool_->residency().use();
  std::promise<void> begun;
  auto shrunk = std::async(std::launch::async, [&] {
    begun.set_value();
    pool_->shrink(5, {}, {});
  });
  begun.get_future().wait();
  // Blocks that stay may be used meanwhile; a use that began before keeps those that are to go.
  while (pool_->residency().limit(0) == 50) std::this_thread::yield();
  EXPECT_CODE(not_resident, pool_->residency().check_range(0, 0, 50));
  {
    const Residency::Use other = pool_->residency().use();
    pool_->residency().check_range(0, 0, 5);
  }
  EXPECT_TRUE(accessible(at(0, 49)));
  EXPECT_EQ(shrunk.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  use.end();
  shrunk.get();
  EXPECT_FALSE(accessible(at(0, 49)));
  EXPECT_CODE(not_resident, pool_->residency().check_range(0, 0, 50));
}

class ManualEvent final : public Event {
 public:
  [[nodiscard]] bool done() const override { return fired_.load(); }
  void wait(Deadline deadline) const override {
    waited_.store(true);
    while (!fired_.load()) {
      if (deadline.passed()) throw Error(ErrorCode::timeout, "the event did not fire");
      std::this_thread::yield();
    }
  }
  mutable std::atomic<bool> waited_{false};
  std::atomic<bool> fired_{false};
};

TEST_P(KVPoolTest, TakingMemoryAwayWaitsForEvents) {
  open({0, 1}, 50);
  const auto event = std::make_shared<ManualEvent>();
  const std::vector<std::shared_ptr<Event>> after{nullptr, event};
  auto shrunk = std::async(std::launch::async, [&] { pool_->shrink(5, {}, {}, after); });
  while (!event->waited_.load()) std::this_thread::yield();
  EXPECT_TRUE(accessible(at(0, 49)));
  // Questions are answered meanwhile.
  EXPECT_EQ(pool_->capacity(), 50u);
  EXPECT_EQ(pool_->layers(), (Layers{0, 1}));
  EXPECT_EQ(pool_->stats().capacity, 50u);
  pool_->residency().check_range(0, 0, 50);
  event->fired_.store(true);
  shrunk.get();
  EXPECT_FALSE(accessible(at(0, 49)));
  pool_->drop_layers(Layers{1}, after);
}

TEST(KVPoolEndTest, MemoryThatIsUsedBeyondTheDeadlineOutlivesItsPool) {
  const auto device = std::make_shared<FaultDevice>(std::make_shared<HostDevice>());
  const std::size_t page = device->info().page_granularity;
  KVPoolOptions options;
  options.num_layers = 2;
  options.layers = {0, 1};
  options.max_blocks = options.capacity = 8;
  const KVSpec spec{3, 5, DType::float32, 4, BlockOrder::hnd};
  const auto pages = PagePool::create(device, {page, 64 * page, 0});
  for (const bool hangs : {true, false}) {
    auto pool = KVPool::create(spec, pages, options);
    int stream = 0;
    pool->residency().note_stream(Stream{&stream});
    const std::byte* const address = pool->layer_memory(1).base;
    if (hangs) device->fail(DeviceCall::record, 1, 1, ErrorCode::timeout);
    pool.reset();
    EXPECT_EQ(testing::accessible(address), hangs);
    // Of the two pools there have been, only the first one's pages are in use.
    EXPECT_EQ(pages->stats().used_bytes, 2 * page);
  }
}

TEST_P(KVPoolTest, AFailureWhoseUndoingFailsMakesThePoolRefuse) {
  open({0, 1}, 30);
  // The second of two layers cannot be unmapped and the first cannot be mapped again.
  fault_->fail(DeviceCall::unmap, 2);
  fault_->fail(DeviceCall::map, 1);
  EXPECT_CODE(device, pool_->shrink(3, {}, {}));
  fault_->disarm();
  EXPECT_ERROR(device, "the KV pool is unusable", pool_->grow(40));
  // Nothing is touched that might not be mapped.
  EXPECT_CODE(not_resident, pool_->residency().check_range(0, 0, 1));
  pool_->close();
  EXPECT_EQ(pages_->stats().used_bytes, 0u);
}

}  // namespace
}  // namespace pipelive
