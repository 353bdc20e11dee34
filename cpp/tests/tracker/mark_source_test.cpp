// Steps whose slots the device marks, and steps that events seal.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "pipelive/base/error.hpp"
#include "pipelive/tracker/dirty_tracker.hpp"
#include "tracker/host_marks.hpp"

namespace pipelive {
namespace {

using test::FakeEvent;
using test::HostMarks;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr Stream kStream{};

template <typename Call>
std::pair<ErrorCode, std::string> error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  ADD_FAILURE() << "no error was raised";
  return {};
}

class MarkedSteps : public ::testing::Test {
 protected:
  std::shared_ptr<HostMarks> marks = std::make_shared<HostMarks>(1000, 6);  // 4 steps in flight
  DirtyTracker tracker{1000, 0, marks};

  void begin(std::int64_t seq) {
    tracker.open(seq);
    tracker.mark(seq, kStream);
  }
};

TEST_F(MarkedSteps, AreCollectedOnceTheirEventHasPassed) {
  const auto event = std::make_shared<FakeEvent>();
  begin(0);
  marks->write(kStream, 5);
  marks->write(kStream, 6);
  tracker.seal(0, event);
  EXPECT_EQ(tracker.sealed_through(), -1);
  EXPECT_EQ(tracker.open_steps(), 1U);
  EXPECT_THAT(tracker.collect().ranges, IsEmpty());
  event->pass();
  EXPECT_EQ(tracker.sealed_through(), 0);
  EXPECT_EQ(tracker.open_steps(), 0U);
  EXPECT_EQ(tracker.pending_slots(), 2U);
  const Collected collected = tracker.collect();
  EXPECT_THAT(collected.ranges, ElementsAre(SlotRange{5, 2}));
  EXPECT_EQ(collected.through_seq, 0);
  EXPECT_EQ(collected.num_slots, 2U);
  EXPECT_THAT(tracker.collect().ranges, IsEmpty());
}

TEST_F(MarkedSteps, InFlightKeepTheirMarks) {
  begin(0);
  marks->write(kStream, 1);
  tracker.seal(0);
  begin(1);
  marks->write(kStream, 2);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{1, 1}));
  marks->write(kStream, 3);
  tracker.seal(1);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{2, 2}));
}

TEST_F(MarkedSteps, MergeWithWhatTheHostHasNoted) {
  begin(0);
  tracker.record(0, std::vector<std::int64_t>{4, 10});
  marks->write(kStream, 5);
  marks->write(kStream, 10);
  tracker.seal(0);
  const Collected collected = tracker.collect();
  EXPECT_THAT(collected.ranges, ElementsAre(SlotRange{4, 2}, SlotRange{10, 1}));
  EXPECT_EQ(collected.num_slots, 3U);
}

TEST_F(MarkedSteps, RunForEverWithoutACollect) {
  for (std::int64_t seq = 0; seq < 100; ++seq) {
    begin(seq);
    marks->write(kStream, static_cast<std::uint64_t>(seq % 50) * 2);
    const auto event = std::make_shared<FakeEvent>();
    tracker.seal(seq, event);
    event->pass();
  }
  EXPECT_EQ(tracker.pending_slots(), 50U);
  EXPECT_EQ(tracker.collect().num_slots, 50U);
  EXPECT_EQ(tracker.pending_slots(), 0U);
}

TEST_F(MarkedSteps, TooManyInFlightAreRefusedByName) {
  for (std::int64_t seq = 0; seq < 4; ++seq) begin(seq);
  tracker.open(4);
  const auto [code, message] = error_of([&] { tracker.mark(4, kStream); });
  EXPECT_EQ(code, ErrorCode::busy);
  EXPECT_THAT(message, HasSubstr("4 steps are in flight and step 0"));
  tracker.seal(0);
  tracker.mark(4, kStream);
  EXPECT_EQ(error_of([&] { tracker.mark(4, kStream); }).first, ErrorCode::invalid_argument);
}

TEST_F(MarkedSteps, HeldStepsStayOutForAsLongAsTheHoldLasts) {
  begin(0);
  marks->write(kStream, 1);
  tracker.hold_from(1);
  tracker.seal(0);
  for (std::int64_t seq = 1; seq < 30; ++seq) {
    begin(seq);
    marks->write(kStream, static_cast<std::uint64_t>(seq) * 10);
    tracker.seal(seq);
  }
  const Collected before = tracker.collect();
  EXPECT_THAT(before.ranges, ElementsAre(SlotRange{1, 1}));
  EXPECT_EQ(before.through_seq, 0);
  EXPECT_EQ(tracker.pending_slots(), 0U);
  tracker.release_hold();
  EXPECT_EQ(tracker.pending_slots(), 29U);
  const Collected after = tracker.collect();
  EXPECT_EQ(after.num_slots, 29U);
  EXPECT_EQ(after.through_seq, 29);
}

TEST_F(MarkedSteps, AFailedTakeLosesNothing) {
  for (std::int64_t seq = 0; seq < 9; ++seq) {  // more than there are sets
    begin(seq);
    marks->write(kStream, static_cast<std::uint64_t>(seq) * 2);
    tracker.seal(seq);
  }
  tracker.open(9);
  tracker.record(9, std::vector<std::int64_t>{100});
  tracker.seal(9);
  EXPECT_EQ(tracker.pending_slots(), 10U);
  marks->fail_next();
  EXPECT_EQ(error_of([&] { (void)tracker.collect(); }).first, ErrorCode::device);
  EXPECT_EQ(tracker.pending_slots(), 10U);
  begin(10);
  marks->write(kStream, 200);
  tracker.seal(10);
  EXPECT_EQ(tracker.collect().num_slots, 11U);
}

TEST_F(MarkedSteps, AResetEmptiesTheSets) {
  begin(0);
  marks->write(kStream, 1);
  tracker.seal(0);
  begin(1);
  marks->write(kStream, 2);
  tracker.reset(7);
  begin(7);
  marks->write(kStream, 3);
  tracker.seal(7);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{3, 1}));
}

TEST_F(MarkedSteps, AFailedEventIsReportedAndTheStepStaysOpen) {
  const auto event = std::make_shared<FakeEvent>();
  begin(0);
  tracker.seal(0, event);
  event->fail();
  EXPECT_EQ(error_of([&] { (void)tracker.collect(); }).first, ErrorCode::device);
  EXPECT_EQ(error_of([&] { tracker.open(1); }).first, ErrorCode::device);
  EXPECT_EQ(tracker.next_seq(), 1);
  EXPECT_EQ(error_of([&] { tracker.seal(0); }).first, ErrorCode::invalid_argument);
}

TEST_F(MarkedSteps, MisuseIsRefused) {
  DirtyTracker plain(10);
  plain.open(0);
  EXPECT_EQ(error_of([&] { plain.mark(0, kStream); }).first, ErrorCode::invalid_argument);
  EXPECT_EQ(error_of([&] { tracker.mark(0, kStream); }).first, ErrorCode::invalid_argument);
  EXPECT_EQ(error_of([&] { plain.seal(0, nullptr); }).first, ErrorCode::invalid_argument);
  EXPECT_EQ(error_of([&] { DirtyTracker other(999, 0, marks); }).first,
            ErrorCode::invalid_argument);
  EXPECT_EQ(error_of([&] { DirtyTracker other(10, 0, std::make_shared<HostMarks>(10, 2)); }).first,
            ErrorCode::invalid_argument);
}

TEST_F(MarkedSteps, WaitingEndsWithTheEventOrTheDeadline) {
  const auto event = std::make_shared<FakeEvent>();
  begin(0);
  begin(1);
  EXPECT_EQ(error_of([&] { tracker.wait_sealed(0, Deadline::after_seconds(0.01)); }).first,
            ErrorCode::timeout);
  tracker.seal(0, event);
  EXPECT_EQ(error_of([&] { tracker.wait_sealed(0, Deadline::after_seconds(0.01)); }).first,
            ErrorCode::timeout);
  std::thread other([&] {
    event->pass();
    tracker.seal(1);
  });
  tracker.wait_sealed(1, Deadline::after_seconds(30));
  other.join();
  EXPECT_EQ(tracker.sealed_through(), 1);
}

// The same writes, noted by the host of one tracker and by the device of another, are collected the
// same, whatever order seals, events, holds and collects come in.
TEST(MarkedStepsModel, AgreeWithTheHostsLog) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 random(seed);
    const auto marks = std::make_shared<HostMarks>(500, 3 + random() % 5);
    const unsigned most = marks->num_sets() - 2;
    DirtyTracker device(500, 0, marks);
    DirtyTracker host(500);
    std::map<std::int64_t, std::shared_ptr<FakeEvent>> open;  // null: not given to the tracker yet
    std::int64_t next = 0;
    bool held = false;
    const auto seal = [&](std::int64_t seq) {
      host.seal(seq);
      if (open.at(seq)) {
        open.at(seq)->pass();
      } else {
        device.seal(seq);
      }
      open.erase(seq);
    };
    for (int i = 0; i < 80; ++i) {
      SCOPED_TRACE(std::to_string(seed) + "/" + std::to_string(i));
      const unsigned kind = random() % 10;
      if (kind < 4 &&
          static_cast<std::int64_t>(open.empty() ? 0 : next - open.begin()->first) < most) {
        device.open(next);
        host.open(next);
        void* const handle = &open;
        device.mark(next, Stream{handle});
        for (unsigned n = random() % 6; n > 0; --n) {
          const std::int64_t slot = random() % 500;
          host.record(next, {&slot, 1});
          marks->write(Stream{handle}, static_cast<std::uint64_t>(slot));
        }
        open[next] = nullptr;
        if (random() % 2 == 0) {
          open[next] = std::make_shared<FakeEvent>();
          device.seal(next, open[next]);
        }
        ++next;
      } else if (kind < 7 && !open.empty()) {
        auto chosen = open.begin();
        std::advance(chosen, random() % open.size());
        seal(chosen->first);
      } else if (kind == 7) {
        if (held) {
          device.release_hold();
          host.release_hold();
        } else {
          device.hold_from(next);
          host.hold_from(next);
        }
        held = !held;
      } else {
        ASSERT_EQ(device.sealed_through(), host.sealed_through());
        ASSERT_EQ(device.pending_slots(), host.pending_slots());
        const Collected a = device.collect();
        const Collected b = host.collect();
        ASSERT_EQ(a.ranges, b.ranges);
        ASSERT_EQ(a.through_seq, b.through_seq);
        ASSERT_EQ(a.num_slots, b.num_slots);
      }
    }
  }
}

}  // namespace
}  // namespace pipelive
