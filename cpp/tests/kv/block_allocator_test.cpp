#include "pipelive/kv/block_allocator.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using Ids = std::vector<std::int64_t>;
using Moves = std::vector<IdMove>;

void expect_refused(const std::function<void()>& call, const std::string& text,
                    ErrorCode code = ErrorCode::invalid_argument) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown, expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_THAT(error.what(), HasSubstr(text));
  }
}

TEST(IdSet, FindsTheLowestAtEverySize) {
  for (const std::uint64_t limit : {1ULL, 64ULL, 65ULL, 4096ULL, 4097ULL, 300000ULL}) {
    IdSet set(limit);
    set.insert(limit - 1);
    EXPECT_EQ(set.lowest(), limit - 1);
    EXPECT_TRUE(set.contains(limit - 1));
    if (limit > 1) {
      set.insert(limit / 2);
      set.insert(0);
      EXPECT_EQ(set.lowest(), 0U);
      set.erase(0);
      EXPECT_EQ(set.lowest(), limit / 2);
      EXPECT_FALSE(set.contains(0));
      EXPECT_EQ(set.size(), limit == 64 || limit / 2 != limit - 1 ? 2U : 1U);
    }
  }
}

TEST(BlockAllocator, HandsOutLowIdsFirst) {
  BlockAllocator blocks(100, 10);
  EXPECT_EQ(blocks.num_free(), 9);
  EXPECT_EQ(blocks.max_blocks(), 100);
  EXPECT_THAT(blocks.allocate(4), ElementsAre(1, 2, 3, 4));
  blocks.release(Ids{3, 1});
  EXPECT_THAT(blocks.allocate(3), ElementsAre(1, 3, 5));
  EXPECT_THAT(blocks.allocate(0), IsEmpty());
  EXPECT_EQ(blocks.generation(1), 2U);
  EXPECT_EQ(blocks.generation(5), 1U);
  EXPECT_EQ(blocks.generation(0), 0U);
  EXPECT_THAT(blocks.live(), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_EQ(blocks.num_live(), 6);
}

TEST(BlockAllocator, RunsOutByName) {
  BlockAllocator blocks(100, 10);
  (void)blocks.allocate(4);
  blocks.release(Ids{2}, 7);
  expect_refused([&] { (void)blocks.allocate(6); },
                 "6 blocks wanted, 5 free of 10 (4 live, 1 in quarantine)", ErrorCode::over_budget);
  EXPECT_EQ(blocks.num_free(), 5);
  EXPECT_EQ(blocks.allocate(5).size(), 5U);
}

TEST(BlockAllocator, SharedBlocksLiveUntilTheLastRelease) {
  BlockAllocator blocks(100, 10);
  const Ids ids = blocks.allocate(2);
  blocks.share(ids);
  blocks.share(Ids{1, 1});
  EXPECT_EQ(blocks.refcount(1), 4U);
  blocks.release(Ids{1, 1, 1, 2});
  EXPECT_EQ(blocks.refcount(1), 1U);
  EXPECT_EQ(blocks.refcount(2), 1U);
  blocks.release(Ids{1, 2});
  EXPECT_THAT(blocks.live(), ElementsAre(0));
  EXPECT_EQ(blocks.num_free(), 9);
}

TEST(BlockAllocator, CopyOnWriteTakesANewBlockOnlyWhenShared) {
  BlockAllocator blocks(100, 4);
  (void)blocks.allocate(2);
  EXPECT_EQ(blocks.writable(1).id, 1);
  EXPECT_FALSE(blocks.writable(1).copy_from.has_value());
  blocks.share(Ids{1});
  const BlockAllocator::Writable own = blocks.writable(1);
  EXPECT_EQ(own.id, 3);
  EXPECT_EQ(own.copy_from, 1);
  EXPECT_EQ(blocks.refcount(1), 1U);
  EXPECT_EQ(blocks.refcount(3), 1U);
  blocks.share(Ids{1});
  expect_refused([&] { (void)blocks.writable(1); }, "1 blocks wanted, 0 free",
                 ErrorCode::over_budget);
  EXPECT_EQ(blocks.refcount(1), 2U);
  expect_refused([&] { (void)blocks.writable(0); }, "null block");
  expect_refused([&] { (void)blocks.writable(50); }, "id is 50, which is not allocated");
}

TEST(BlockAllocator, RefusesBadReleasesAndLeavesEverything) {
  BlockAllocator blocks(100, 10);
  (void)blocks.allocate(3);
  expect_refused([&] { blocks.release(Ids{1, 2, 1}); }, "ids[2] is 1, listed more often");
  expect_refused([&] { blocks.release(Ids{1, 4}); }, "ids[1] is 4, which is not allocated");
  expect_refused([&] { blocks.release(Ids{1, 0}); }, "ids[1] is 0, the null block");
  expect_refused([&] { blocks.release(Ids{1, -1}); }, "ids[1] is -1, expected 1 to 99");
  expect_refused([&] { blocks.release(Ids{1, 100}); }, "ids[1] is 100, expected 1 to 99");
  expect_refused([&] { blocks.release(Ids{1}, -1); }, "after_seq is -1");
  expect_refused([&] { blocks.share(Ids{1, 4}); }, "ids[1] is 4, which is not allocated");
  expect_refused([&] { blocks.share(Ids{0}); }, "null block");
  EXPECT_EQ(blocks.refcount(1), 1U);
  EXPECT_EQ(blocks.refcount(2), 1U);
  blocks.release(Ids{3});
  expect_refused([&] { blocks.release(Ids{3}); }, "ids[0] is 3, which is not allocated");
  blocks.release(Ids{2}, 5);
  expect_refused([&] { blocks.release(Ids{2}); }, "ids[0] is 2, which was released already");
  EXPECT_THAT(blocks.live(), ElementsAre(0, 1));
}

TEST(BlockAllocator, RefusesBadNumbers) {
  expect_refused([] { BlockAllocator bad(0, 1); }, "max_blocks is 0");
  expect_refused([] { BlockAllocator bad(BlockAllocator::kMaxBlocks + 1, 1); }, "max_blocks is");
  expect_refused([] { BlockAllocator bad(10, 0); }, "capacity is 0, expected 1 to 10");
  expect_refused([] { BlockAllocator bad(10, 11); }, "capacity is 11, expected 1 to 10");
  BlockAllocator blocks(100, 10);
  expect_refused([&] { (void)blocks.allocate(-1); }, "count is -1");
  expect_refused([&] { (void)blocks.generation(100); }, "id is 100, expected 0 to 99");
  expect_refused([&] { (void)blocks.refcount(-1); }, "id is -1, expected 0 to 99");
  expect_refused([&] { blocks.raise_capacity(9); }, "capacity is 9, expected 10 to 100");
  expect_refused([&] { blocks.raise_capacity(101); }, "capacity is 101, expected 10 to 100");
  expect_refused([&] { (void)blocks.plan_shrink(0); }, "capacity is 0, expected 1 to 10");
  expect_refused([&] { (void)blocks.plan_shrink(11); }, "capacity is 11, expected 1 to 10");
}

TEST(BlockAllocator, QuarantinedIdsComeBackWhenTheirStepRetires) {
  BlockAllocator blocks(100, 5);
  (void)blocks.allocate(4);
  blocks.release(Ids{1}, 3);
  blocks.release(Ids{2, 3}, 1);
  EXPECT_THAT(blocks.quarantined(), ElementsAre(1, 2, 3));
  EXPECT_THAT(blocks.live(), ElementsAre(0, 4));
  EXPECT_EQ(blocks.num_free(), 0);
  blocks.retire(0);
  EXPECT_EQ(blocks.num_quarantined(), 3);
  blocks.retire(2);
  EXPECT_THAT(blocks.quarantined(), ElementsAre(1));
  EXPECT_EQ(blocks.num_free(), 2);
  blocks.retire(1);  // lower than before
  EXPECT_THAT(blocks.quarantined(), ElementsAre(1));
  blocks.release(Ids{4}, 2);  // has retired already
  EXPECT_THAT(blocks.quarantined(), ElementsAre(1));
  blocks.retire(10);
  EXPECT_EQ(blocks.num_free(), 4);
  EXPECT_THAT(blocks.allocate(4), ElementsAre(1, 2, 3, 4));
}

TEST(BlockAllocator, ASharedBlockGoesToQuarantineOnlyWithTheLastRelease) {
  BlockAllocator blocks(100, 5);
  (void)blocks.allocate(1);
  blocks.share(Ids{1});
  blocks.release(Ids{1}, 3);
  EXPECT_EQ(blocks.num_quarantined(), 0);
  blocks.release(Ids{1}, 3);
  EXPECT_EQ(blocks.num_quarantined(), 1);
}

TEST(BlockAllocator, RaisingTheCapacityAddsIds) {
  BlockAllocator blocks(8, 2);
  (void)blocks.allocate(1);
  blocks.raise_capacity(4);
  EXPECT_EQ(blocks.capacity(), 4);
  EXPECT_THAT(blocks.allocate(2), ElementsAre(2, 3));
  blocks.raise_capacity(4);
  EXPECT_EQ(blocks.num_free(), 0);
}

TEST(BlockAllocator, ShrinkMovesHighIdsToTheLowestFree) {
  BlockAllocator blocks(100, 12);
  (void)blocks.allocate(11);
  blocks.share(Ids{9, 9});
  blocks.release(Ids{2, 4, 5, 8, 11});
  const Moves moves = blocks.plan_shrink(8);
  EXPECT_THAT(moves, ElementsAre(IdMove{9, 2}, IdMove{10, 4}));
  EXPECT_EQ(blocks.planned_capacity(), 8);
  EXPECT_EQ(blocks.capacity(), 12);
  EXPECT_EQ(blocks.num_free(), 1);  // 5; 8 and 11 are too high, 2 and 4 are targets
  expect_refused([&] { (void)blocks.plan_shrink(5); }, "do not fit a capacity of 5",
                 ErrorCode::over_budget);
  EXPECT_EQ(blocks.plan_shrink(8), moves);
  expect_refused([&] { blocks.raise_capacity(20); }, "a shrink to 8", ErrorCode::busy);
  EXPECT_THAT(blocks.allocate(1), ElementsAre(5));
  expect_refused([&] { (void)blocks.allocate(1); },
                 "0 free of 8 (8 live, 0 in quarantine, a shrink", ErrorCode::over_budget);
  blocks.apply_shrink(8, Moves{moves[1], moves[0]});
  EXPECT_EQ(blocks.capacity(), 8);
  EXPECT_FALSE(blocks.planned_capacity().has_value());
  EXPECT_THAT(blocks.live(), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_EQ(blocks.refcount(2), 3U);
  EXPECT_EQ(blocks.refcount(9), 0U);
  EXPECT_EQ(blocks.generation(2), 2U);
  EXPECT_EQ(blocks.num_free(), 0);
  blocks.raise_capacity(12);
  EXPECT_THAT(blocks.allocate(4), ElementsAre(8, 9, 10, 11));
}

TEST(BlockAllocator, ShrinkIsRefusedWhereTheBlocksDoNotFit) {
  BlockAllocator blocks(100, 12);
  (void)blocks.allocate(11);
  blocks.release(Ids{2, 3, 4, 8});
  blocks.release(Ids{5, 9}, 1);
  // Live are 0 1 6 7 10 11; 5 is in quarantine below 6, 9 above it.
  expect_refused([&] { (void)blocks.plan_shrink(6); },
                 "6 live blocks (the null block included) and 1 in quarantine below the new "
                 "capacity do not fit a capacity of 6 blocks",
                 ErrorCode::over_budget);
  EXPECT_FALSE(blocks.planned_capacity().has_value());
  EXPECT_EQ(blocks.num_free(), 4);
  blocks.retire(1);
  EXPECT_THAT(blocks.plan_shrink(6),
              ElementsAre(IdMove{6, 2}, IdMove{7, 3}, IdMove{10, 4}, IdMove{11, 5}));
}

TEST(BlockAllocator, ANewPlanReplacesTheOldOne) {
  BlockAllocator blocks(100, 12);
  (void)blocks.allocate(11);
  blocks.release(Ids{1, 2, 3, 4, 8});
  EXPECT_EQ(blocks.plan_shrink(8).size(), 3U);
  blocks.release(Ids{9});
  EXPECT_THAT(blocks.plan_shrink(10), ElementsAre(IdMove{10, 1}, IdMove{11, 2}));
  EXPECT_THAT(blocks.allocate(4), ElementsAre(3, 4, 8, 9));
  blocks.apply_shrink(10, Moves{{10, 1}, {11, 2}});
  EXPECT_EQ(blocks.num_live(), 10);
}

TEST(BlockAllocator, CancelledShrinkLeavesEverything) {
  BlockAllocator blocks(100, 12);
  blocks.cancel_shrink();
  (void)blocks.allocate(10);
  blocks.release(Ids{1, 2, 9});
  (void)blocks.plan_shrink(9);
  blocks.release(Ids{10});
  blocks.cancel_shrink();
  EXPECT_FALSE(blocks.planned_capacity().has_value());
  EXPECT_THAT(blocks.allocate(5), ElementsAre(1, 2, 9, 10, 11));
}

TEST(BlockAllocator, ABlockReleasedWhileAShrinkIsPlannedDoesNotMove) {
  BlockAllocator blocks(100, 12);
  (void)blocks.allocate(11);
  blocks.release(Ids{1, 2, 3});
  const Moves moves = blocks.plan_shrink(9);
  EXPECT_THAT(moves, ElementsAre(IdMove{9, 1}, IdMove{10, 2}, IdMove{11, 3}));
  blocks.release(Ids{10});
  EXPECT_EQ(blocks.num_free(), 0);
  blocks.release(Ids{11}, 4);
  expect_refused([&] { blocks.apply_shrink(9, moves); },
                 "block 11, past the new capacity 9, is in quarantine until step 4",
                 ErrorCode::busy);
  expect_refused([&] { blocks.apply_shrink(9, moves, 3); }, "later than after_seq 3",
                 ErrorCode::busy);
  blocks.apply_shrink(9, moves, 4);
  EXPECT_THAT(blocks.live(), ElementsAre(0, 1, 4, 5, 6, 7, 8));
  EXPECT_THAT(blocks.quarantined(), ElementsAre(9, 11));
  EXPECT_EQ(blocks.num_free(), 2);
  blocks.raise_capacity(12);
  EXPECT_EQ(blocks.num_free(), 3);  // 2, 3 and 10
  blocks.retire(4);
  EXPECT_THAT(blocks.allocate(5), ElementsAre(2, 3, 9, 10, 11));
}

TEST(BlockAllocator, QuarantinePastTheCapacityEndsWithoutFreeingIds) {
  BlockAllocator blocks(100, 4);
  (void)blocks.allocate(3);
  blocks.release(Ids{3}, 5);
  (void)blocks.plan_shrink(3);
  blocks.apply_shrink(3, {}, 5);
  blocks.retire(5);
  EXPECT_EQ(blocks.num_quarantined(), 0);
  EXPECT_EQ(blocks.num_free(), 0);
  blocks.raise_capacity(4);
  EXPECT_EQ(blocks.num_free(), 1);
}

TEST(BlockAllocator, ApplyRefusesWhatWasNotPlanned) {
  BlockAllocator blocks(100, 12);
  expect_refused([&] { blocks.apply_shrink(9, {}); }, "capacity is 9, expected a planned shrink");
  (void)blocks.allocate(11);
  blocks.release(Ids{1, 2, 3});
  const Moves moves = blocks.plan_shrink(9);
  expect_refused([&] { blocks.apply_shrink(8, moves); }, "capacity is 8, expected 9");
  expect_refused([&] { blocks.apply_shrink(13, {}); }, "capacity is 13, expected 9, which is");
  expect_refused([&] { blocks.apply_shrink(10, moves); }, "has 9 -> 1 where the plan has 10 -> 2");
  expect_refused([&] { blocks.apply_shrink(9, {}); }, "has nothing more where the plan has 9 -> 1");
  Moves wrong = moves;
  wrong[1].to = 5;
  expect_refused([&] { blocks.apply_shrink(9, wrong); }, "has 10 -> 5 where the plan has 10 -> 2");
  wrong = moves;
  wrong.push_back({12, 4});
  expect_refused([&] { blocks.apply_shrink(9, wrong); }, "has 12 -> 4 where the plan has nothing");
  expect_refused([&] { blocks.apply_shrink(9, moves, -2); }, "after_seq is -2");
  EXPECT_EQ(blocks.planned_capacity(), 9);
  blocks.apply_shrink(9, moves);
}

TEST(BlockAllocator, TheUpperPartOfAPlanIsCarriedOutAndTheRestDropped) {
  BlockAllocator blocks(100, 12);
  (void)blocks.allocate(11);
  blocks.release(Ids{1, 2, 3, 10});
  EXPECT_EQ(blocks.plan_shrink(8), (Moves{{8, 1}, {9, 2}, {11, 3}}));
  blocks.apply_shrink(9, Moves{{9, 2}, {11, 3}}, 4);
  EXPECT_EQ(blocks.capacity(), 9);
  EXPECT_EQ(blocks.planned_capacity(), std::nullopt);
  EXPECT_EQ(blocks.num_free(), 1);  // block 1 is nobody's target any more
  EXPECT_EQ(blocks.refcount(2), 1u);
  EXPECT_EQ(blocks.refcount(3), 1u);
  // The next part needs nothing of what is in quarantine above.
  EXPECT_EQ(blocks.plan_shrink(8), (Moves{{8, 1}}));
  blocks.apply_shrink(8, Moves{{8, 1}}, 5);
  blocks.retire(5);
  EXPECT_EQ(blocks.capacity(), 8);
  EXPECT_EQ(blocks.num_free(), 0);
  blocks.raise_capacity(12);
  EXPECT_EQ(blocks.num_free(), 4);
}

// No id may ever be held by two threads, and in the end everything is free again.
TEST(BlockAllocator, ThreadsNeverGetTheSameBlock) {
  constexpr int kThreads = 4;
  constexpr std::int64_t kCapacity = 256;
  BlockAllocator blocks(kCapacity, kCapacity);
  std::vector<std::atomic<int>> holders(kCapacity);
  std::atomic<std::int64_t> next_seq{0};
  std::atomic<int> running{kThreads};
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(static_cast<unsigned>(t));
        for (int i = 0; i < 2000; ++i) {
          Ids ids;
          try {
            ids = blocks.allocate(static_cast<std::int64_t>(random() % 40));
          } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::over_budget);
            continue;
          }
          for (const std::int64_t id : ids) {
            EXPECT_EQ(holders[static_cast<std::size_t>(id)].fetch_add(1), 0);
          }
          blocks.share(ids);
          blocks.release(ids);
          for (const std::int64_t id : ids) holders[static_cast<std::size_t>(id)].fetch_sub(1);
          if (random() % 2 == 0) {
            blocks.release(ids, next_seq++);
          } else {
            blocks.release(ids);
          }
        }
        --running;
      });
    }
    while (running > 0) {
      blocks.retire(next_seq - 2);
      EXPECT_LE(blocks.num_free(), kCapacity - 1);
      std::this_thread::yield();
    }
  }
  blocks.retire(next_seq);
  EXPECT_EQ(blocks.num_free(), kCapacity - 1);
  EXPECT_THAT(blocks.live(), ElementsAre(0));
}

}  // namespace
}  // namespace pipelive
