#include "pipelive/migration/write_through.hpp"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
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

// Connections that are lost at any moment, and made again: nothing is lost, and what a target has
// applied does not come again, since by then it may have written there itself.
TEST_P(WritingThrough, GoesOnOverNewConnections) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  EndMemory source{small_spec(), {2, 5}, 16};
  EndMemory near{small_spec(), {2, 5}, 16};
  EndMemory far{small_spec(), {2, 5}, 16};
  const std::array<EndMemory*, 2> targets{&near, &far};
  PatchReceiver::Options receiving;
  receiving.epoch = kEpoch;
  PatchSender::Options sending;
  sending.epoch = kEpoch;
  std::array<std::optional<RunningReceiver>, 2> running;
  std::array<std::shared_ptr<PatchSender>, 2> senders;
  const auto connect = [&](std::size_t place) {
    auto [a, b] = make_channels(GetParam());
    running.at(place).emplace(b, targets.at(place)->patch_layers(), receiving);
    senders.at(place) = std::make_shared<PatchSender>(a, source.patch_layers(), sending);
  };
  connect(0);
  connect(1);
  const auto tracker = std::make_shared<DirtyTracker>(source.slots());
  WriteThrough through(tracker, {senders.at(0), senders.at(1)}, {});

  constexpr std::int64_t kSteps = 300;
  std::atomic<int> losses = 0;
  std::thread writer([&] {
    std::mt19937_64 values(seed + 1);
    for (std::int64_t seq = 0; seq < kSteps; ++seq) {
      while (through.sent_through() < seq - 4 || (losses == 0 && seq > kSteps / 2)) {
        std::this_thread::yield();
      }
      tracker->open(seq);
      const std::uint64_t block = values() % 16;
      const std::vector<SlotRange> written{{4 * block, 4}};
      tracker->record_ranges(seq, written);
      for (const auto& layer : source.layers) {
        std::fill_n(layer->bytes.begin() + static_cast<std::ptrdiff_t>(block * layer->stride),
                    layer->layout.block_bytes, static_cast<std::byte>(values()));
      }
      tracker->seal(seq);
    }
    tracker->hold_from(kSteps);
    through.end_after(kSteps - 1);
  });
  while (true) {
    std::thread cutter;
    std::atomic<bool> cut = false;
    const std::size_t victim = random() % 2;
    const std::int64_t at = through.sent_through() + static_cast<std::int64_t>(random() % 30);
    if (at < kSteps - 5) {
      cutter = std::thread([&] {
        while (through.sent_through() < at) std::this_thread::yield();
        running.at(victim)->receiver.cancel();
        cut = true;
      });
    }
    bool over = false;
    try {
      // The writer may pause before the cut; then nothing is sent that would show it.
      do {
        over = through.run(Deadline::after_seconds(0.05));
      } while (!over && cutter.joinable() && !cut);
    } catch (const Error& error) {
      EXPECT_NE(error.code(), ErrorCode::invalid_argument) << error.what();
    }
    if (cutter.joinable()) cutter.join();
    if (over) break;
    for (std::size_t place = 0; place < 2; ++place) {
      if (!senders.at(place)->failed() && !(cut && place == victim)) continue;
      losses += 1;
      const std::uint64_t applied = running.at(place)->end();
      connect(place);
      through.resume(place, senders.at(place), applied);
    }
  }
  writer.join();
  EXPECT_GT(losses, 0);
  for (EndMemory* target : targets) {
    for (std::size_t i = 0; i < source.layers.size(); ++i) {
      EXPECT_TRUE(source.layers[i]->bytes == target->layers[i]->bytes);
    }
  }
}

TEST_P(WritingThrough, WhatWasAppliedDoesNotComeAgain) {
  Writing stage(GetParam());
  stage.start();
  const auto step = [&](std::int64_t seq, std::uint64_t block) {
    stage.tracker->open(seq);
    const std::vector<SlotRange> written{{4 * block, 4}};
    stage.tracker->record_ranges(seq, written);
    stage.write_block(block, std::byte{1});
    stage.tracker->seal(seq);
  };
  step(0, 3);
  stage.running->receiver.wait_applied(0, soon());
  const std::uint64_t applied = stage.running->end();
  step(1, 4);
  EXPECT_TRUE(stage.outcome.get());
  // The target runs the layers now, and has used the block for something else.
  for (const auto& layer : stage.target.layers) {
    std::fill_n(layer->bytes.begin() + static_cast<std::ptrdiff_t>(3 * layer->stride),
                layer->layout.block_bytes, std::byte{9});
  }
  auto [a, b] = make_channels(GetParam());
  PatchReceiver::Options receiving;
  receiving.epoch = kEpoch;
  stage.running.emplace(b, stage.target.patch_layers(), receiving);
  PatchSender::Options sending;
  sending.epoch = kEpoch;
  EXPECT_EQ(code_of([&] { stage.through->resume(1, stage.sender, applied); }),
            ErrorCode::invalid_argument);
  stage.sender = std::make_shared<PatchSender>(a, stage.source.patch_layers(), sending);
  EXPECT_EQ(code_of([&] { stage.through->resume(0, stage.sender, applied + 3); }),
            ErrorCode::invalid_argument);
  stage.through->resume(0, stage.sender, applied);
  stage.through->end_after(1);
  stage.start();
  EXPECT_FALSE(stage.outcome.get());
  EXPECT_EQ(stage.running->receiver.stats().slots, 4U * 2);
  const auto& bytes = stage.target.layers[0]->bytes;
  const std::size_t stride = stage.target.layers[0]->stride;
  EXPECT_EQ(bytes[3 * stride], std::byte{9});
  EXPECT_EQ(bytes[4 * stride], std::byte{1});
}

TEST(WriteThroughArguments, NeedsATrackerAndSenders) {
  EXPECT_EQ(code_of([] { WriteThrough(nullptr, {}, {}); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([] { WriteThrough(std::make_shared<DirtyTracker>(4), {nullptr}, {}); }),
            ErrorCode::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Channels, WritingThrough,
                         testing::Values(ChannelKind::shm, ChannelKind::tcp),
                         [](const auto& kind) { return test::name_of(kind.param); });

}  // namespace
}  // namespace pipelive
