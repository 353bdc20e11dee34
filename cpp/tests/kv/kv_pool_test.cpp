#include "pipelive/kv/kv_pool.hpp"

#include <gtest/gtest.h>

#include <future>
#include <thread>

#include "device/device_cases.hpp"
#include "device/fault_tools.hpp"
#include "pipelive/kv/layer_view.hpp"

namespace pipelive {
namespace {

using testing::pattern;
using testing::read;
using testing::write;
using Layers = std::vector<std::uint32_t>;
using Ids = std::vector<std::uint64_t>;
using Moves = std::vector<BlockMove>;

class KVPoolFixture : public testing::DeviceFixture {
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

  void open(const Layers& layers, std::uint64_t capacity, std::uint32_t stack = 1,
            HolePolicy holes = HolePolicy::fault) {
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

// What any failing device call leaves behind: everything as it was.
using FaultCase = std::tuple<testing::DeviceCase, HolePolicy>;

class KVPoolFaultTest : public KVPoolFixture, public ::testing::WithParamInterface<FaultCase> {
 protected:
  [[nodiscard]] const testing::DeviceCase& device_case() const override {
    return std::get<0>(GetParam());
  }
  [[nodiscard]] HolePolicy holes() const { return std::get<1>(GetParam()); }
  void SetUp() override {
    KVPoolFixture::SetUp();
    if (IsSkipped()) return;
    open({0, 1, 4, 5}, 30, 2, holes());
    for (const std::uint64_t block : {0, 1, 8, 29}) put(block);
    before_ = device_->usage();
    used_ = pages_->stats().used_bytes;
  }
  void check() {
    EXPECT_EQ(pool_->capacity(), 30u);
    EXPECT_EQ(pool_->layers(), (Layers{0, 1, 4, 5}));
    EXPECT_EQ(pages_->stats().used_bytes, used_);
    EXPECT_EQ(device_->usage().mapped_bytes, before_.mapped_bytes);
    EXPECT_EQ(device_->usage().reserved_bytes, before_.reserved_bytes);
    EXPECT_EQ(device_->usage().page_bytes, pages_->stats().held_bytes);
    for (const std::uint64_t block : {0, 1, 8, 29}) EXPECT_TRUE(holds(block, block));
    pool_->residency().check_range(4, 0, 30);
    EXPECT_CODE(not_resident, pool_->residency().check_range(4, 0, 31));
    EXPECT_CODE(not_resident, pool_->residency().check_range(2, 0, 1));
  }
  // So that pages must be created and used ones scrubbed.
  void mix_pages() {
    pages_->trim();
    PageLease dirty = pages_->take(3);
    dirty.mark_dirty();
  }

  DeviceUsage before_;
  std::uint64_t used_ = 0;
};

TEST_P(KVPoolFaultTest, Grow) {
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        mix_pages();
        pool_->grow(95);
      },
      [&] { pool_->shrink(30, Ids{0, 1, 8, 29}, {}); }, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::map], 2u);
  EXPECT_GE(failures[DeviceCall::fill], 3u);
  EXPECT_EQ(failures[DeviceCall::unmap], holes() == HolePolicy::scratch ? 2u : 0u);
}

TEST_P(KVPoolFaultTest, Shrink) {
  auto failures = testing::fail_each_call(
      *fault_, [&] { pool_->shrink(9, Ids{0, 1, 8, 29}, Moves{{29, 3}}); },
      [&] {
        pool_->grow(30);
        pool_->move_blocks(Moves{{3, 29}});
      },
      [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::copy], 2u);
  EXPECT_EQ(failures[DeviceCall::unmap], 2u);
  EXPECT_EQ(failures[DeviceCall::map_repeated], holes() == HolePolicy::scratch ? 2u : 0u);
  check();
}

TEST_P(KVPoolFaultTest, Reclaim) {
  // Until it succeeds the pages are there, and nothing but the capacity has changed.
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        if (pool_->capacity() == 30) pool_->lower(9, Ids{0, 1, 8}, {});
        pool_->reclaim();
      },
      [&] {
        EXPECT_LT(pages_->stats().used_bytes, used_);
        pool_->grow(30);
      },
      [&] {
        EXPECT_EQ(pool_->capacity(), 9u);
        EXPECT_EQ(pages_->stats().used_bytes, used_);
        EXPECT_EQ(device_->usage().mapped_bytes, before_.mapped_bytes);
        for (const std::uint64_t block : {0, 1, 8}) EXPECT_TRUE(holds(block, block));
      });
  EXPECT_EQ(failures[DeviceCall::unmap], 2u);
}

TEST_P(KVPoolFaultTest, AddLayers) {
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        mix_pages();
        pool_->add_layers(Layers{2, 3, 6});
      },
      [&] { pool_->drop_layers(Layers{2, 3, 6}); }, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::map], 2u);
  EXPECT_GE(failures[DeviceCall::create_pages], 1u);
}

TEST_P(KVPoolFaultTest, DropLayers) {
  const auto restore = [&] {
    pool_->add_layers(Layers{0, 1, 4, 5});
    for (const std::uint64_t block : {0, 1, 8, 29}) put(block);
  };
  auto failures = testing::fail_each_call(
      *fault_, [&] { pool_->drop_layers(Layers{0, 1, 4, 5}); }, restore, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::unmap], 2u);
}

TEST_P(KVPoolFaultTest, MoveBlocks) {
  auto failures = testing::fail_each_call(
      *fault_, [&] { pool_->move_blocks(Moves{{1, 12}, {8, 20}}); }, [] {}, [&] { check(); });
  EXPECT_EQ(failures[DeviceCall::copy], 4u);
  // Once for each stream that must be done before, once for the copies.
  const std::size_t streams = device_->implicit_streams().size();
  EXPECT_EQ(failures[DeviceCall::record], 1u + streams);
  EXPECT_EQ(failures[DeviceCall::order_after], streams);
}

TEST_P(KVPoolFaultTest, Create) {
  std::shared_ptr<KVPool> other;
  KVPoolOptions options;
  options.num_layers = 4;
  options.layers = {0, 1};
  options.max_blocks = 40;
  options.capacity = 20;
  options.holes = holes();
  const auto check_gone = [&] {
    EXPECT_EQ(other, nullptr);
    check();
  };
  auto failures = testing::fail_each_call(
      *fault_,
      [&] {
        mix_pages();
        other = KVPool::create(spec_, pages_, options);
      },
      [&] { other.reset(); }, check_gone);
  EXPECT_EQ(failures[DeviceCall::reserve], 4u);
  EXPECT_EQ(failures[DeviceCall::map], 2u);
}

INSTANTIATE_TEST_SUITE_P(Holes, KVPoolFaultTest,
                         ::testing::Combine(::testing::ValuesIn(testing::device_cases()),
                                            ::testing::Values(HolePolicy::fault,
                                                              HolePolicy::scratch)),
                         [](const auto& suite) {
                           const bool fault = std::get<1>(suite.param) == HolePolicy::fault;
                           return std::get<0>(suite.param).name + (fault ? "_fault" : "_scratch");
                         });

}  // namespace
}  // namespace pipelive
