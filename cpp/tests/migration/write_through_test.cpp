#include "pipelive/migration/write_through.hpp"

#include <gtest/gtest.h>

#include <future>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "migration/session.hpp"
#include "pipelive/tracker/slot_ranges.hpp"

namespace pipelive {
namespace {

using test::ChannelKind;
using test::code_of;
using test::EndMemory;
using test::make_channels;
using test::RunningReceiver;
using test::shortly;
using test::small_spec;
using test::soon;

constexpr std::uint64_t kEpoch = 4;

// A stage that writes single slots step by step, with a target that its layers go to.
struct Writing {
  explicit Writing(ChannelKind kind, const WriteThrough::Options& options = {}) {
    auto [a, b] = make_channels(kind);
    PatchReceiver::Options receiving;
    receiving.epoch = kEpoch;
    running.emplace(b, target.patch_layers(), receiving);
    PatchSender::Options sending;
    sending.epoch = kEpoch;
    sender = std::make_shared<PatchSender>(a, source.patch_layers(), sending);
    tracker = std::make_shared<DirtyTracker>(source.slots());
    through.emplace(tracker, std::vector{sender}, options);
  }
  void start() {
    outcome = std::async(std::launch::async, [this]() -> std::optional<Error> {
      try {
        EXPECT_TRUE(through->run(soon()));
      } catch (const Error& error) {
        return error;
      }
      return std::nullopt;
    });
  }
  void write_block(std::uint64_t block, std::byte value) {
    for (const auto& layer : source.layers) {
      std::fill_n(layer->bytes.begin() + static_cast<std::ptrdiff_t>(block * layer->stride),
                  layer->layout.block_bytes, value);
    }
  }
  [[nodiscard]] bool same() const {
    for (std::size_t i = 0; i < source.layers.size(); ++i) {
      if (source.layers[i]->bytes != target.layers[i]->bytes) return false;
    }
    return true;
  }

  EndMemory source{small_spec(), {2, 5}, 16};
  EndMemory target{small_spec(), {2, 5}, 16};
  std::optional<RunningReceiver> running;
  std::shared_ptr<PatchSender> sender;
  std::shared_ptr<DirtyTracker> tracker;
  std::optional<WriteThrough> through;
  std::future<std::optional<Error>> outcome;
};

class WritingThrough : public testing::TestWithParam<ChannelKind> {};

TEST_P(WritingThrough, EveryStepUpToTheLastIsThere) {
  Writing stage(GetParam());
  stage.start();
  std::mt19937_64 random(3);
  for (std::int64_t seq = 0; seq < 200; ++seq) {
    stage.tracker->open(seq);
    const std::uint64_t block = random() % 16;
    const std::vector<SlotRange> written{{4 * block, 4}};
    stage.tracker->record_ranges(seq, written);
    stage.write_block(block, static_cast<std::byte>(random()));
    stage.tracker->seal(seq);
    if (seq % 7 == 0) stage.running->receiver.wait_applied(seq, soon());
  }
  stage.tracker->hold_from(200);
  stage.through->end_after(199);
  EXPECT_FALSE(stage.outcome.get());
  EXPECT_EQ(stage.running->receiver.applied_through(), 199);
  EXPECT_TRUE(stage.same());
  const std::vector<SentStep> sent = stage.through->sent();
  EXPECT_EQ(sent.back().through_seq, 199);
  for (std::size_t i = 1; i < sent.size(); ++i) {
    EXPECT_EQ(sent[i].round, sent[i - 1].round + 1);
    EXPECT_LT(sent[i - 1].through_seq, sent[i].through_seq);
    EXPECT_LE(sent[i].start_ns, sent[i].end_ns);
  }
  stage.sender->finish(soon());
}

TEST_P(WritingThrough, AStepThatIsNotSealedIsNotSent) {
  Writing stage(GetParam());
  stage.start();
  stage.tracker->open(0);
  stage.tracker->open(1);
  const std::vector<SlotRange> written{{4, 4}};
  stage.tracker->record_ranges(1, written);
  stage.tracker->seal(1);  // a later one is complete: it waits for the one before
  EXPECT_EQ(code_of([&] { stage.running->receiver.wait_applied(0, shortly()); }),
            ErrorCode::timeout);
  EXPECT_EQ(stage.through->sent_through(), -1);
  EXPECT_TRUE(stage.through->sent().empty());
  stage.tracker->seal(0);
  stage.running->receiver.wait_applied(1, soon());
  stage.through->end_after(1);
  EXPECT_FALSE(stage.outcome.get());
}

TEST_P(WritingThrough, WhatLaterStepsWriteStaysHere) {
  Writing stage(GetParam());
  stage.tracker->open(0);
  stage.tracker->open(1);
  stage.tracker->hold_from(1);
  stage.through->end_after(0);
  const std::vector<SlotRange> written{{8, 1}};
  stage.tracker->record_ranges(1, written);
  stage.tracker->seal(0);
  stage.tracker->seal(1);
  stage.start();
  EXPECT_FALSE(stage.outcome.get());
  EXPECT_EQ(stage.through->sent_through(), 0);
  EXPECT_EQ(stage.running->receiver.stats().slots, 0);
}

TEST_P(WritingThrough, AnIdleStageIsToldThatItHasSentAll) {
  Writing stage(GetParam());
  stage.tracker->open(0);
  stage.tracker->seal(0);
  stage.start();
  stage.running->receiver.wait_applied(0, soon());
  const std::vector<SlotRange> external{{12, 2}};
  stage.tracker->seal_external(stage.tracker->record_external_ranges(external));
  stage.through->end_after(0);
  EXPECT_FALSE(stage.outcome.get());
  stage.sender->finish(soon());
  EXPECT_EQ(stage.running->receiver.stats().slots, 4);  // of two layers
}

TEST_P(WritingThrough, RangesAreKeptForAVerification) {
  WriteThrough::Options options;
  options.keep_ranges = true;
  Writing stage(GetParam(), options);
  for (std::int64_t seq = 0; seq < 3; ++seq) {
    stage.tracker->open(seq);
    const std::vector<SlotRange> written{{static_cast<std::uint64_t>(seq), 2}};
    stage.tracker->record_ranges(seq, written);
    stage.tracker->seal(seq);
  }
  stage.through->end_after(2);
  stage.start();
  EXPECT_FALSE(stage.outcome.get());
  const std::vector<SlotRange> all{{0, 4}};
  EXPECT_EQ(stage.through->ranges(), all);
}

TEST_P(WritingThrough, EndsAtACancelAndAtItsDeadline) {
  Writing stage(GetParam());
  EXPECT_FALSE(stage.through->run(shortly()));
  stage.start();
  stage.through->cancel();
  EXPECT_EQ(stage.outcome.get()->code(), ErrorCode::cancelled);
}

TEST_P(WritingThrough, ATargetThatGivesUpEndsIt) {
  Writing stage(GetParam());
  stage.start();
  stage.running->receiver.cancel();
  std::int64_t seq = 0;
  while (stage.outcome.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready) {
    stage.tracker->open(seq);
    stage.tracker->seal(seq++);
  }
  EXPECT_TRUE(stage.outcome.get());
}

TEST(WriteThroughArguments, NeedsATrackerAndSenders) {
  EXPECT_EQ(code_of([] { WriteThrough(nullptr, {}, {}); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([] { WriteThrough(std::make_shared<DirtyTracker>(4), {nullptr}, {}); }),
            ErrorCode::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Channels, WritingThrough,
                         testing::Values(ChannelKind::shm, ChannelKind::tcp),
                         [](const auto& info) { return test::name_of(info.param); });

}  // namespace
}  // namespace pipelive
