#include "pipelive/tracker/dirty_tracker.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using Slots = std::vector<std::int64_t>;
using Ranges = std::vector<SlotRange>;

void expect_refused(const std::function<void()>& call, const std::string& text,
                    ErrorCode code = ErrorCode::invalid_argument) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown, expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    EXPECT_THAT(error.what(), HasSubstr(text));
  }
}

TEST(DirtyTracker, CollectsNothingBeforeTheSeal) {
  DirtyTracker tracker(100);
  tracker.open(0);
  tracker.record(0, Slots{5, 4, -1, 7});
  const Collected before = tracker.collect();
  EXPECT_THAT(before.ranges, IsEmpty());
  EXPECT_EQ(before.through_seq, -1);
  tracker.seal(0);
  EXPECT_EQ(tracker.pending_slots(), 3U);
  const Collected after = tracker.collect();
  EXPECT_THAT(after.ranges, ElementsAre(SlotRange{4, 2}, SlotRange{7, 1}));
  EXPECT_EQ(after.through_seq, 0);
  EXPECT_EQ(after.num_slots, 3U);
  EXPECT_GT(after.generation, before.generation);
  EXPECT_EQ(tracker.pending_slots(), 0U);
  EXPECT_THAT(tracker.collect().ranges, IsEmpty());
}

TEST(DirtyTracker, CollectsOnlyAPrefixOfSealedSteps) {
  DirtyTracker tracker(100, 10);
  EXPECT_EQ(tracker.sealed_through(), 9);
  for (std::int64_t seq = 10; seq < 14; ++seq) {
    tracker.open(seq);
    tracker.record(seq, Slots{seq});
  }
  tracker.seal(11);
  tracker.seal(12);
  EXPECT_EQ(tracker.collect().through_seq, 9);
  EXPECT_EQ(tracker.open_steps(), 2U);
  tracker.record(10, Slots{50});
  tracker.seal(10);
  const Collected collected = tracker.collect();
  EXPECT_EQ(collected.through_seq, 12);
  EXPECT_THAT(collected.ranges, ElementsAre(SlotRange{10, 3}, SlotRange{50, 1}));
  EXPECT_EQ(tracker.next_seq(), 14);
}

TEST(DirtyTracker, ASlotWrittenAgainIsCollectedAgain) {
  DirtyTracker tracker(100);
  for (std::int64_t seq = 0; seq < 3; ++seq) {
    tracker.open(seq);
    tracker.record(seq, Slots{42, 42});
    tracker.seal(seq);
    if (seq != 1) {
      EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{42, 1}));
    }
  }
}

TEST(DirtyTracker, RecordsRangesAndBlocks) {
  DirtyTracker tracker(100);
  tracker.open(0);
  tracker.record_ranges(0, Ranges{{90, 10}, {3, 0}, {0, 2}, {100, 0}});
  tracker.record_blocks(0, Slots{2, 1}, 16);
  tracker.seal(0);
  EXPECT_THAT(tracker.collect().ranges,
              ElementsAre(SlotRange{0, 2}, SlotRange{16, 32}, SlotRange{90, 10}));
}

TEST(DirtyTracker, ExternalWritesWaitForTheirOwnSeal) {
  DirtyTracker tracker(100);
  const std::uint64_t slots = tracker.record_external(Slots{1, -1});
  const std::uint64_t ranges = tracker.record_external_ranges(Ranges{{20, 2}});
  const std::uint64_t blocks = tracker.record_external_blocks(Slots{3}, 16);
  tracker.open(0);
  tracker.record(0, Slots{99});
  tracker.seal(0);
  const Collected first = tracker.collect();
  EXPECT_THAT(first.ranges, ElementsAre(SlotRange{99, 1}));
  EXPECT_EQ(first.through_seq, 0);
  EXPECT_EQ(first.open_externals, 3U);
  tracker.seal_external(blocks);
  tracker.seal_external(slots);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{1, 1}, SlotRange{48, 16}));
  tracker.seal_external(ranges);
  EXPECT_EQ(tracker.open_externals(), 0U);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{20, 2}));
  expect_refused([&] { tracker.seal_external(ranges); }, "token 2");
  expect_refused([&] { tracker.seal_external(77); }, "token 77");
}

TEST(DirtyTracker, RestoredRangesComeAgain) {
  DirtyTracker tracker(100);
  tracker.open(0);
  tracker.record(0, Slots{1, 2, 60});
  tracker.seal(0);
  const Collected lost = tracker.collect();
  tracker.open(1);
  tracker.record(1, Slots{2, 3});
  tracker.seal(1);
  tracker.restore(lost.ranges);
  EXPECT_EQ(tracker.pending_slots(), 4U);
  const Collected again = tracker.collect();
  EXPECT_THAT(again.ranges, ElementsAre(SlotRange{1, 3}, SlotRange{60, 1}));
  EXPECT_EQ(again.num_slots, 4U);
  expect_refused([&] { tracker.restore(Ranges{{99, 2}}); }, "ranges[0] is (begin 99, count 2)");
}

TEST(DirtyTracker, ResetDropsEverything) {
  DirtyTracker tracker(100);
  tracker.open(0);
  tracker.record(0, Slots{1});
  tracker.seal(0);
  tracker.open(1);
  tracker.record(1, Slots{2});
  const std::uint64_t token = tracker.record_external(Slots{3});
  const std::uint64_t generation = tracker.collect().generation;
  tracker.reset(40);
  EXPECT_EQ(tracker.next_seq(), 40);
  EXPECT_EQ(tracker.open_steps(), 0U);
  EXPECT_EQ(tracker.open_externals(), 0U);
  const Collected collected = tracker.collect();
  EXPECT_THAT(collected.ranges, IsEmpty());
  EXPECT_EQ(collected.through_seq, 39);
  EXPECT_GT(collected.generation, generation);
  expect_refused([&] { tracker.seal(1); }, "step 1 is sealed already");
  expect_refused([&] { tracker.seal_external(token); }, "dropped by a reset");
  EXPECT_NE(tracker.record_external(Slots{3}), token);
  expect_refused([&] { tracker.reset(-1); }, "next_seq is -1");
}

TEST(DirtyTracker, AHoldKeepsLaterWritesBack) {
  DirtyTracker tracker(100);
  const std::uint64_t before = tracker.record_external(Slots{50});
  tracker.open(0);
  tracker.open(1);
  tracker.record(0, Slots{0});
  tracker.record(1, Slots{10});
  tracker.hold_from(2);
  tracker.hold_from(2);
  const std::uint64_t after = tracker.record_external(Slots{60});
  for (std::int64_t seq = 2; seq < 4; ++seq) {
    tracker.open(seq);
    tracker.record(seq, Slots{10 + seq * 10});
    tracker.seal(seq);
  }
  tracker.seal(0);
  tracker.seal_external(after);
  EXPECT_EQ(tracker.open_externals(), 1U);
  const std::uint64_t open = tracker.record_external(Slots{70});
  EXPECT_EQ(tracker.open_externals(), 2U);
  const Collected first = tracker.collect();
  EXPECT_EQ(first.through_seq, 0);
  EXPECT_EQ(first.open_externals, 1U);  // only `before` belongs to this side of the hold
  tracker.seal(1);
  tracker.seal_external(before);
  EXPECT_EQ(tracker.sealed_through(), 3);
  EXPECT_EQ(tracker.pending_slots(), 2U);
  const Collected held = tracker.collect();
  EXPECT_EQ(held.through_seq, 1);
  EXPECT_THAT(held.ranges, ElementsAre(SlotRange{10, 1}, SlotRange{50, 1}));
  expect_refused([&] { tracker.seal(2); }, "step 2 is sealed already");
  expect_refused([&] { tracker.seal_external(after); }, "token 2");
  expect_refused([&] { tracker.hold_from(3); }, "steps from 2 on are held", ErrorCode::busy);
  tracker.release_hold();
  const Collected rest = tracker.collect();
  EXPECT_EQ(rest.through_seq, 3);
  EXPECT_THAT(rest.ranges, ElementsAre(SlotRange{30, 1}, SlotRange{40, 1}, SlotRange{60, 1}));
  tracker.release_hold();
  EXPECT_EQ(rest.open_externals, 1U);
  tracker.seal_external(open);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{70, 1}));
  expect_refused([&] { tracker.hold_from(3); }, "step 3 is sealed");
  tracker.hold_from(4);
  tracker.reset(7);
  tracker.open(7);
  tracker.record(7, Slots{1});
  tracker.seal(7);
  EXPECT_EQ(tracker.collect().num_slots, 1U);
}

TEST(DirtyTracker, RefusesMisuse) {
  DirtyTracker tracker(100);
  expect_refused([&] { tracker.open(1); }, "seq is 1, expected 0");
  expect_refused([&] { tracker.record(0, Slots{1}); }, "step 0 was not opened");
  expect_refused([&] { tracker.seal(0); }, "step 0 was not opened");
  expect_refused([&] { tracker.seal(-1); }, "step -1 was not opened");
  tracker.open(0);
  expect_refused([&] { tracker.open(0); }, "seq is 0, expected 1");
  tracker.open(1);
  tracker.seal(1);
  expect_refused([&] { tracker.seal(1); }, "step 1 is sealed already");
  expect_refused([&] { tracker.record(1, Slots{1}); }, "step 1 is sealed already");
  tracker.seal(0);
  expect_refused([&] { tracker.record_ranges(0, Ranges{}); }, "step 0 is sealed already");
  expect_refused([&] { tracker.record_blocks(0, Slots{}, 1); }, "step 0 is sealed already");
  expect_refused([] { DirtyTracker bad(0); }, "num_slots is 0");
  expect_refused([] { DirtyTracker bad(DirtyTracker::kMaxSlots + 1); }, "num_slots is 68719476737");
  expect_refused([] { DirtyTracker bad(1, -1); }, "next_seq is -1");
}

TEST(DirtyTracker, ARefusedRecordLeavesNothingBehind) {
  DirtyTracker tracker(100);
  tracker.open(0);
  tracker.record(0, Slots{7});
  expect_refused([&] { tracker.record(0, Slots{8, 9, 100}); }, "slots[2] is 100");
  expect_refused([&] { tracker.record(0, Slots{8, -2}); }, "slots[1] is -2");
  expect_refused([&] { tracker.record_ranges(0, Ranges{{8, 1}, {99, 2}}); },
                 "ranges[1] is (begin 99, count 2)");
  expect_refused([&] { tracker.record_ranges(0, Ranges{{5, ~std::uint64_t{0}}}); }, "ranges[0]");
  expect_refused([&] { tracker.record_blocks(0, Slots{0, 6}, 16); }, "ids[1] is 6");
  expect_refused([&] { tracker.record_blocks(0, Slots{-1}, 16); }, "ids[0] is -1");
  expect_refused([&] { tracker.record_blocks(0, Slots{1}, 0); }, "block_size is 0");
  expect_refused([&] { (void)tracker.record_external(Slots{100}); }, "slots[0] is 100");
  EXPECT_EQ(tracker.open_externals(), 0U);
  tracker.seal(0);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{7, 1}));
}

TEST(DirtyTracker, RefusesAnEndlessLineOfUnsealedSteps) {
  DirtyTracker tracker(1);
  for (std::uint64_t seq = 0; seq < DirtyTracker::kMaxOpenSteps; ++seq) {
    tracker.open(static_cast<std::int64_t>(seq));
  }
  const auto next = static_cast<std::int64_t>(DirtyTracker::kMaxOpenSteps);
  expect_refused([&] { tracker.open(next); }, "step 0", ErrorCode::busy);
  tracker.seal(0);
  tracker.open(next);
}

TEST(DirtyTracker, RefusesAnEndlessLineOfUnsealedExternals) {
  DirtyTracker tracker(1);
  for (std::uint64_t i = 0; i < DirtyTracker::kMaxOpenExternals; ++i) {
    (void)tracker.record_external({});
  }
  expect_refused([&] { (void)tracker.record_external({}); }, "65536 external writes",
                 ErrorCode::busy);
}

TEST(DirtyTracker, AScatteredLogTurnsIntoABitmap) {
  constexpr std::int64_t kSlots = 1 << 20;
  DirtyTracker tracker(kSlots);
  const std::uint64_t before = tracker.memory_bytes();
  tracker.open(0);
  Slots even;
  for (std::int64_t slot = 0; slot < kSlots; slot += 2) even.push_back(slot);
  for (int round = 0; round < 4; ++round) {
    for (std::size_t begin = 0; begin < even.size(); begin += 8192) {
      tracker.record(0, std::span(even).subspan(begin, 8192));
    }
  }
  tracker.record(0, Slots{1});
  EXPECT_LE(tracker.memory_bytes() - before, 3 * before / 2);
  tracker.seal(0);
  const Collected collected = tracker.collect();
  EXPECT_EQ(collected.num_slots, static_cast<std::uint64_t>(kSlots / 2 + 1));
  ASSERT_EQ(collected.ranges.size(), static_cast<std::size_t>(kSlots / 2 - 1));
  EXPECT_EQ(collected.ranges[0], (SlotRange{0, 3}));
  EXPECT_EQ(collected.ranges.back(), (SlotRange{kSlots - 2, 1}));
}

TEST(DirtyTracker, MemoryStaysBoundedWhenNobodyCollects) {
  DirtyTracker tracker(1 << 16);
  const auto run = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t seq = first; seq < last; ++seq) {
      tracker.open(seq);
      for (int i = 0; i < 4; ++i) {
        tracker.record(seq, Slots{(seq * 7919 + i * 131) % (1 << 16)});
      }
      if (seq > 0) tracker.seal(seq - 1);
    }
  };
  run(0, 100);
  const std::uint64_t early = tracker.memory_bytes();
  run(100, 20000);
  EXPECT_EQ(tracker.memory_bytes(), early);
}

// Writers hold a value per slot that they raise between the record and the seal, as a device would.
// A collector copies the collected slots. If a write were collected before its seal, or lost, the
// copy would differ in the end, or an older value would be copied last.
TEST(DirtyTracker, ConcurrentWritersLoseNothing) {
  constexpr std::int64_t kSlots = 4096;
  constexpr std::int64_t kSteps = 3000;
  constexpr int kWriters = 3;
  DirtyTracker tracker(kSlots);
  std::vector<std::atomic<std::int64_t>> source(kSlots);
  std::vector<std::int64_t> target(kSlots, -1);
  for (auto& value : source) value = -1;
  std::atomic<std::int64_t> next{0};
  std::atomic<int> running{kWriters};
  std::mutex order;  // steps are numbered and opened in one order

  const auto writer = [&](unsigned seed) {
    std::mt19937 random(seed);
    while (true) {
      std::int64_t seq = 0;
      {
        const std::lock_guard lock(order);
        seq = next++;
        if (seq < kSteps) tracker.open(seq);
      }
      if (seq >= kSteps) break;
      Slots slots;
      for (int i = 0; i < 8; ++i) slots.push_back(static_cast<std::int64_t>(random() % kSlots));
      tracker.record(seq, std::span(slots).first(4));
      tracker.record(seq, std::span(slots).last(4));
      const Slots outside{static_cast<std::int64_t>(random() % kSlots)};
      const std::uint64_t token = tracker.record_external(outside);
      for (const std::int64_t slot : slots) source[static_cast<std::size_t>(slot)]++;
      tracker.seal(seq);
      source[static_cast<std::size_t>(outside[0])]++;
      tracker.seal_external(token);
    }
    --running;
  };

  std::int64_t through = -1;
  std::uint64_t generation = 0;
  const auto collect = [&] {
    const Collected collected = tracker.collect();
    EXPECT_GE(collected.through_seq, through);
    EXPECT_GT(collected.generation, generation);
    through = collected.through_seq;
    generation = collected.generation;
    std::uint64_t slots = 0;
    for (const SlotRange& range : collected.ranges) {
      slots += range.count;
      for (std::uint64_t slot = range.begin; slot < range.end(); ++slot) {
        target[slot] = source[slot].load();
      }
    }
    EXPECT_EQ(slots, collected.num_slots);
  };
  {
    std::vector<std::jthread> threads;
    for (unsigned i = 0; i < kWriters; ++i) threads.emplace_back(writer, i);
    threads.emplace_back([&] {
      while (running > 0) {
        (void)tracker.pending_slots();
        (void)tracker.memory_bytes();
        std::this_thread::yield();
      }
    });
    while (running > 0) collect();
  }
  collect();
  EXPECT_EQ(through, kSteps - 1);
  for (std::size_t slot = 0; slot < kSlots; ++slot) ASSERT_EQ(target[slot], source[slot].load());
}

// Every step writes its own slots, so the collected ranges tell exactly which steps are in them.
TEST(DirtyTracker, ThroughSeqIsExactUnderConcurrency) {
  constexpr std::int64_t kSteps = 4000;
  constexpr std::int64_t kWidth = 3;
  DirtyTracker tracker(kSteps * kWidth);
  std::atomic<bool> done{false};
  std::jthread engine([&] {
    std::mt19937 random(1);
    std::vector<std::int64_t> in_flight;
    for (std::int64_t seq = 0; seq < kSteps || !in_flight.empty(); ++seq) {
      if (seq < kSteps) {
        tracker.open(seq);
        in_flight.push_back(seq);
      }
      if (in_flight.size() >= 6 || seq >= kSteps) {
        const std::size_t index = random() % in_flight.size();
        const std::int64_t sealed = in_flight[index];
        tracker.record_blocks(sealed, Slots{sealed}, kWidth);
        tracker.seal(sealed);
        in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(index));
      }
    }
    done = true;
  });
  std::int64_t through = -1;
  for (bool last = false; !last;) {
    last = done;
    const Collected collected = tracker.collect();
    if (collected.through_seq == through) {
      ASSERT_THAT(collected.ranges, IsEmpty());
      continue;
    }
    ASSERT_THAT(collected.ranges,
                ElementsAre(SlotRange{
                    static_cast<std::uint64_t>((through + 1) * kWidth),
                    static_cast<std::uint64_t>((collected.through_seq - through) * kWidth)}));
    through = collected.through_seq;
  }
  EXPECT_EQ(through, kSteps - 1);
}

TEST(DirtyTracker, ResetAndCollectMayRace) {
  DirtyTracker tracker(1 << 12);
  std::atomic<bool> done{false};
  std::jthread collector([&] {
    while (!done) (void)tracker.collect();
  });
  for (std::int64_t round = 0; round < 500; ++round) {
    tracker.reset(round * 10);
    tracker.open(round * 10);
    tracker.record(round * 10, Slots{1, 2, 3});
    tracker.seal(round * 10);
  }
  tracker.reset(9000);
  done = true;
  collector.join();
  EXPECT_THAT(tracker.collect().ranges, IsEmpty());
}

}  // namespace
}  // namespace pipelive
