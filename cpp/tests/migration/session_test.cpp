// A sender and a receiver together, over both kinds of channel.
#include <gtest/gtest.h>

#include <atomic>
#include <limits>

#include "migration/session.hpp"
#include "pipelive/device/host_device.hpp"
#include "pipelive/kv/kv_pool.hpp"
#include "pipelive/kv/layer_view.hpp"
#include "pipelive/memory/page_pool.hpp"

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

const std::vector<std::uint32_t> kLayers{2, 5, 6};
constexpr std::uint64_t kEpoch = 7;

PatchSender::Options options_of(std::size_t max_message = std::size_t{4} << 20,
                                bool checksum = true) {
  PatchSender::Options options;
  options.epoch = kEpoch;
  options.max_message_bytes = max_message;
  options.checksum = checksum;
  return options;
}

PatchReceiver::Options receiving() {
  PatchReceiver::Options options;
  options.epoch = kEpoch;
  return options;
}

void expect_equal(const EndMemory& a, const EndMemory& b, std::span<const SlotRange> ranges) {
  for (std::size_t i = 0; i < a.ids.size(); ++i) {
    for (const SlotRange& range : ranges) {
      for (std::uint64_t s = range.begin; s < range.end(); ++s) {
        ASSERT_EQ(a.layers[i]->slot(s), b.layers[i]->slot(s))
            << "layer " << a.ids[i] << " slot " << s;
      }
    }
  }
}

class Session : public ::testing::TestWithParam<ChannelKind> {
 protected:
  Session()
      : source(small_spec(), kLayers, 64, 2), target(small_spec(BlockOrder::nhd), kLayers, 64) {
    for (std::size_t i = 0; i < kLayers.size(); ++i) source.layers[i]->fill(i + 1);
  }
  EndMemory source;
  EndMemory target;
};

INSTANTIATE_TEST_SUITE_P(Kinds, Session, PIPELIVE_CHANNEL_KINDS,
                         [](const auto& kind) { return test::name_of(kind.param); });

TEST_P(Session, BulkRoundsAndTail) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender sender(a, source.patch_layers(), options_of());
  EXPECT_EQ(sender.applied_through(), -1);
  const std::vector<SlotRange> all{{0, source.slots()}};
  const RoundStats bulk = sender.send_round(0, 10, all, {}, soon());
  EXPECT_EQ(bulk.slots, 3 * source.slots());
  EXPECT_EQ(bulk.skipped_slots, 0U);
  sender.wait_applied(10, soon());
  running.receiver.wait_applied(10, soon());
  expect_equal(source, target, all);
  source.layers[1]->fill(99);
  const std::vector<SlotRange> dirty{{3, 1}, {17, 30}};
  sender.send_round(1, 12, dirty, {}, soon());
  running.receiver.wait_applied(12, soon());
  expect_equal(source, target, dirty);
  EXPECT_EQ(sender.verify(dirty, soon()), 3 * 31U);
  sender.finish(soon());
  EXPECT_FALSE(running.outcome());
  EXPECT_EQ(running.receiver.applied_through(), 12);
  EXPECT_EQ(running.receiver.stats().rounds, 2U);
  EXPECT_EQ(sender.applied_through(), 12);
}

TEST_P(Session, RoundsOfManySmallMessages) {
  for (const bool checksum : {true, false}) {
    const auto [a, b] = make_channels(GetParam(), 8192);
    target.layers[0]->fill(1234);
    RunningReceiver running(b, target.patch_layers(), receiving());
    // The smallest message that is allowed, so that every slot travels alone; and one in between.
    const std::size_t least = wire::message_bytes(1, source.layers[0]->layout.slot_bytes());
    EXPECT_EQ(code_of([&, &ch = a] {
                PatchSender(ch, source.patch_layers(), options_of(least - 1, checksum));
              }),
              ErrorCode::invalid_argument);
    PatchSender sender(a, source.patch_layers(), options_of(checksum ? least : 1500, checksum));
    std::mt19937_64 random(3);
    const auto ranges = test::random_ranges(random, source.slots(), 60, 20);
    const RoundStats stats = sender.send_round(0, 1, ranges, {}, soon());
    EXPECT_EQ(stats.slots, 3 * test::total(ranges));
    if (checksum) {
      EXPECT_EQ(stats.messages, stats.slots);
    }
    sender.finish(soon());
    EXPECT_FALSE(running.outcome());
    expect_equal(source, target, ranges);
  }
}

TEST_P(Session, EmptyRoundsCountAndEmptySessionsFinish) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender sender(a, source.patch_layers(), options_of());
  const RoundStats stats = sender.send_round(0, 41, {}, {}, soon());
  EXPECT_EQ(stats.messages, 0U);
  const std::vector<SlotRange> nothing{{5, 0}};
  sender.send_round(1, 42, nothing, {}, soon());
  sender.wait_applied(42, soon());
  sender.finish(soon());
  EXPECT_FALSE(running.outcome());
}

TEST_P(Session, LayersAdvanceByTheRoundsThatNameThem) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender sender(a, source.patch_layers(), options_of());
  const std::vector<SlotRange> ranges{{0, 8}};
  const std::uint32_t first[] = {5};
  const std::uint32_t rest[] = {6, 2};
  sender.send_round(0, 3, ranges, first, soon());
  running.receiver.wait_applied(3, soon(), 5);
  EXPECT_EQ(running.receiver.applied_through(), -1);
  EXPECT_EQ(code_of([&] { running.receiver.wait_applied(3, shortly(), 6); }), ErrorCode::timeout);
  EXPECT_EQ(code_of([&] { sender.wait_applied(3, shortly()); }), ErrorCode::timeout);
  sender.send_round(1, 3, ranges, rest, soon());
  sender.wait_applied(3, soon());  // a deadline before did not end the session
  EXPECT_EQ(running.receiver.applied_through(), 3);
  const std::uint32_t foreign[] = {4};
  EXPECT_EQ(code_of([&] { sender.send_round(2, 3, ranges, foreign, soon()); }),
            ErrorCode::invalid_argument);
  sender.finish(soon());
}

TEST_P(Session, CallersMistakesDoNotEndTheSession) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender sender(a, source.patch_layers(), options_of());
  const std::vector<SlotRange> outside{{0, 4}, {source.slots(), 1}};
  EXPECT_EQ(code_of([&] { sender.send_round(0, 1, outside, {}, soon()); }),
            ErrorCode::invalid_argument);
  sender.send_round(0, 5, {}, {}, soon());
  EXPECT_EQ(code_of([&] { sender.send_round(1, 4, {}, {}, soon()); }), ErrorCode::invalid_argument);
  sender.finish(soon());
  EXPECT_FALSE(running.outcome());
}

TEST_P(Session, VerifyNamesTheLayer) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender sender(a, source.patch_layers(), options_of());
  const std::vector<SlotRange> all{{0, source.slots()}};
  sender.send_round(0, 1, all, {}, soon());
  sender.wait_applied(1, soon());
  EXPECT_EQ(sender.verify(all, soon()), 3 * source.slots());
  running.receiver.wait_applied(1, soon());
  target.layers[1]->bytes[100] ^= std::byte{4};
  std::string text;
  EXPECT_EQ(code_of([&] { sender.verify(all, soon()); }, &text), ErrorCode::corrupt);
  EXPECT_NE(text.find("layer 5"), std::string::npos) << text;
}

TEST_P(Session, VerifyOfManyRanges) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender sender(a, source.patch_layers(), options_of(1000));
  const std::vector<SlotRange> all{{0, source.slots()}};
  sender.send_round(0, 1, all, {}, soon());
  sender.wait_applied(1, soon());
  std::vector<SlotRange> single;
  for (int again = 0; again < 20; ++again) {
    for (std::uint64_t s = 0; s < source.slots(); ++s) single.push_back({s, 1});
  }
  EXPECT_EQ(sender.verify(single, soon()), 3 * single.size());
  sender.finish(soon());
}

TEST_P(Session, RegionsArriveWhole) {
  const auto [a, b] = make_channels(GetParam(), 65536);
  std::vector<std::byte> weights(300001);
  std::mt19937_64 random(8);
  for (std::byte& byte : weights) byte = static_cast<std::byte>(random());
  std::vector<std::byte> place(weights.size());
  std::vector<std::byte> empty;
  RunningReceiver running(b, target.patch_layers(), receiving(),
                          {{5, place, nullptr}, {6, empty, nullptr}});
  PatchSender sender(a, source.patch_layers(), options_of());
  EXPECT_EQ(code_of([&] { running.receiver.wait_region(9, soon()); }), ErrorCode::invalid_argument);
  EXPECT_EQ(code_of([&] { running.receiver.wait_region(5, shortly()); }), ErrorCode::timeout);
  sender.send_region(6, {}, soon());
  sender.send_region(5, weights, soon());
  running.receiver.wait_region(5, soon());
  running.receiver.wait_region(6, soon());
  EXPECT_EQ(place, weights);
  EXPECT_EQ(code_of([&] {
              sender.send_region(8, weights, soon());
              sender.finish(soon());
            }),
            ErrorCode::protocol);
}

TEST_P(Session, MismatchesAreRefusedByName) {
  struct Case {
    KVSpec spec;
    std::vector<std::uint32_t> layers;
    const char* name;
  };
  KVSpec block = small_spec();
  block.block_size = 8;
  KVSpec dtype = small_spec();
  dtype.dtype = DType::float16;
  KVSpec heads = small_spec();
  heads.num_kv_heads = 1;
  for (const Case& bad :
       {Case{block, kLayers, "block_size"}, Case{dtype, kLayers, "dtype"},
        Case{heads, kLayers, "num_kv_heads"}, Case{small_spec(), {2, 5}, "number of moving layers"},
        Case{small_spec(), {2, 4, 6}, "moving layers"}}) {
    const auto [a, b] = make_channels(GetParam());
    EndMemory other(bad.spec, bad.layers, 16);
    const std::vector<std::byte> before = other.layers[0]->bytes;
    RunningReceiver running(b, other.patch_layers(), receiving());
    PatchSender sender(a, source.patch_layers(), options_of());
    std::string text;
    EXPECT_EQ(code_of(
                  [&] {
                    const std::vector<SlotRange> ranges{{0, 16}};
                    sender.send_round(0, 1, ranges, {}, soon());
                    sender.wait_applied(1, soon());
                  },
                  &text),
              ErrorCode::protocol);
    EXPECT_NE(text.find(bad.name), std::string::npos) << text;
    const auto outcome = running.outcome();
    ASSERT_TRUE(outcome);
    EXPECT_NE(std::string(outcome->what()).find(bad.name), std::string::npos) << outcome->what();
    EXPECT_EQ(other.layers[0]->bytes, before);
  }
}

TEST_P(Session, AnotherEpochIsRefused) {
  const auto [a, b] = make_channels(GetParam());
  PatchReceiver::Options later = receiving();
  later.epoch = kEpoch + 1;
  const std::vector<std::byte> before = target.layers[0]->bytes;
  RunningReceiver running(b, target.patch_layers(), later);
  PatchSender sender(a, source.patch_layers(), options_of());
  std::string text;
  EXPECT_EQ(code_of(
                [&] {
                  const std::vector<SlotRange> ranges{{0, 16}};
                  sender.send_round(0, 1, ranges, {}, soon());
                  sender.wait_applied(1, soon());
                },
                &text),
            ErrorCode::protocol);
  EXPECT_EQ(running.outcome().value().code(), ErrorCode::protocol);
  EXPECT_EQ(target.layers[0]->bytes, before);
}

TEST_P(Session, ASourceThatGoesEndsTheReceiverAndItsWaiters) {
  auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  auto gate = std::async(std::launch::async, [&] {
    return code_of([&] { running.receiver.wait_applied(100, soon()); });
  });
  {
    PatchSender sender(std::move(a), source.patch_layers(), options_of());
    const std::vector<SlotRange> ranges{{0, 16}};
    sender.send_round(0, 1, ranges, {}, soon());
    running.receiver.wait_applied(1, soon());
  }
  EXPECT_EQ(running.outcome().value().code(), ErrorCode::closed);
  EXPECT_EQ(gate.get(), ErrorCode::closed);
}

TEST_P(Session, ATargetThatGoesEndsTheSender) {
  auto [a, b] = make_channels(GetParam());
  PatchSender sender(a, source.patch_layers(), options_of());
  b.reset();
  EXPECT_EQ(code_of([&] {
              const std::vector<SlotRange> all{{0, source.slots()}};
              for (int i = 0; i < 10000; ++i) sender.send_round(0, i, all, {}, soon());
            }),
            ErrorCode::closed);
  EXPECT_EQ(code_of([&] { sender.wait_applied(1, soon()); }), ErrorCode::closed);
}

TEST_P(Session, CancelOfEitherEndWakesEverybody) {
  for (const bool at_source : {true, false}) {
    const auto [a, b] = make_channels(GetParam());
    RunningReceiver running(b, target.patch_layers(), receiving());
    PatchSender sender(a, source.patch_layers(), options_of());
    auto gate = std::async(std::launch::async, [&] {
      return code_of([&] { running.receiver.wait_applied(100, soon()); });
    });
    auto acks = std::async(std::launch::async,
                           [&] { return code_of([&] { sender.wait_applied(100, soon()); }); });
    if (at_source) {
      sender.cancel();
      sender.cancel();
    } else {
      running.receiver.cancel();
      running.receiver.cancel();
    }
    const ErrorCode there = at_source ? ErrorCode::closed : ErrorCode::cancelled;
    const ErrorCode here = at_source ? ErrorCode::cancelled : ErrorCode::closed;
    EXPECT_EQ(running.outcome().value().code(), there);
    EXPECT_EQ(gate.get(), there);
    EXPECT_EQ(acks.get(), here);
    EXPECT_EQ(code_of([&] { sender.send_round(0, 1, {}, {}, soon()); }), here);
  }
}

TEST_P(Session, NothingIsWrittenAfterACancelHasReturned) {
  // A large round is under way; right after the cancel the target's memory is somebody else's.
  for (int trial = 0; trial < 25; ++trial) {
    const auto [a, b] = make_channels(GetParam());
    RunningReceiver running(b, target.patch_layers(), receiving());
    PatchSender sender(a, source.patch_layers(), options_of(2000));
    std::thread sending([&] {
      const std::vector<SlotRange> all{{0, source.slots()}};
      try {
        for (int i = 0;; ++i) sender.send_round(0, i, all, {}, soon());
      } catch (const Error&) {
      }
    });
    while (running.receiver.stats().messages < 5U) std::this_thread::yield();
    running.receiver.cancel();
    for (auto& layer : target.layers)
      std::fill(layer->bytes.begin(), layer->bytes.end(), std::byte{0x5A});
    sender.cancel();
    sending.join();
    EXPECT_TRUE(running.outcome());
    for (auto& layer : target.layers) {
      ASSERT_TRUE(std::all_of(layer->bytes.begin(), layer->bytes.end(),
                              [](std::byte byte) { return byte == std::byte{0x5A}; }));
    }
  }
}

TEST_P(Session, RateLimitHoldsAndCanBeLifted) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender::Options options = options_of(2000);
  options.rate_limit = 1.0;  // a byte a second: only the first message gets through
  PatchSender sender(a, source.patch_layers(), options);
  const std::vector<SlotRange> all{{0, source.slots()}};
  auto sending =
      std::async(std::launch::async, [&] { return sender.send_round(0, 1, all, {}, soon()); });
  while (running.receiver.stats().messages < 2U) std::this_thread::yield();
  EXPECT_EQ(sending.wait_for(std::chrono::milliseconds(30)), std::future_status::timeout);
  sender.set_rate_limit(0);
  const RoundStats stats = sending.get();
  EXPECT_LT(stats.busy_seconds, 20.0);
  sender.finish(soon());
  EXPECT_FALSE(running.outcome());
  expect_equal(source, target, all);
}

TEST_P(Session, CancelEndsAWaitForTheRateLimit) {
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, target.patch_layers(), receiving());
  PatchSender::Options options = options_of(2000);
  options.rate_limit = 1.0;
  PatchSender sender(a, source.patch_layers(), options);
  const std::vector<SlotRange> all{{0, source.slots()}};
  auto sending = std::async(std::launch::async, [&] {
    return code_of([&] { sender.send_round(0, 1, all, {}, soon()); });
  });
  while (running.receiver.stats().messages < 2U) std::this_thread::yield();
  sender.cancel();
  EXPECT_EQ(sending.get(), ErrorCode::cancelled);
}

TEST_P(Session, AHundredThousandRecordsInOneRound) {
  const KVSpec tiny{1, 1, DType::float16, 1, BlockOrder::hnd};
  EndMemory from(tiny, {0}, 200000);
  EndMemory to(tiny, {0}, 200000);
  from.layers[0]->fill(1);
  const auto [a, b] = make_channels(GetParam(), 65536);
  RunningReceiver running(b, to.patch_layers(), receiving());
  PatchSender sender(a, from.patch_layers(), options_of(20000));
  std::vector<SlotRange> ranges;
  for (std::uint64_t s = 0; s < 200000; s += 2) ranges.push_back({s, 1});
  const RoundStats stats = sender.send_round(0, 1, ranges, {}, soon());
  EXPECT_EQ(stats.records, 100000U);
  sender.verify(ranges, soon());
  sender.finish(soon());
}

// Pools whose unmapped blocks fault when they are touched.
std::shared_ptr<KVPool> make_pool(std::uint64_t capacity) {
  PagePoolOptions pages;
  pages.page_bytes = 4096;
  pages.budget_bytes = std::size_t{64} << 20;
  KVPoolOptions options;
  options.num_layers = 2;
  options.layers = {0, 1};
  options.max_blocks = 64;
  options.capacity = capacity;
  return KVPool::create({2, 64, DType::bfloat16, 16, BlockOrder::hnd},
                        PagePool::create(std::make_shared<HostDevice>(), pages), options);
}

PatchLayers layers_of(const std::shared_ptr<KVPool>& pool) {
  std::vector<PatchLayer> layers;
  for (const std::uint32_t layer : {0U, 1U}) {
    layers.push_back(PatchLayer::of(LayerView(pool, layer)));
  }
  return {pool->spec(), std::move(layers)};
}

TEST_P(Session, ResizesUnderPatchesNeverTouchWhatIsNotMapped) {
  const auto from = make_pool(64);
  const auto to = make_pool(64);
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, layers_of(to), receiving());
  PatchSender sender(a, layers_of(from), options_of(100000));
  // What was packed before a shrink of the source is dropped at the target after its own.
  running.receiver.set_capacity(64, std::numeric_limits<std::int64_t>::max());
  std::atomic<bool> stop{false};
  std::atomic<int> resizes{0};
  std::thread resizing([&] {
    const std::vector<std::uint64_t> live{0, 1, 2, 3};
    while (!stop.load()) {
      from->shrink(8, live, {});
      to->shrink(8, live, {});
      to->grow(64);
      from->grow(64);
      resizes += 1;
    }
  });
  const std::vector<SlotRange> all{{0, 64 * 16}};
  std::uint64_t round = 0;
  for (; round < 100 || resizes.load() < 20; ++round) {
    sender.send_round(round, static_cast<std::int64_t>(round), all, {}, soon());
    sender.wait_applied(static_cast<std::int64_t>(round), soon());
  }
  stop = true;
  resizing.join();
  sender.finish(soon());
  EXPECT_FALSE(running.outcome());
}

TEST_P(Session, ALayerThatIsNotHeldIsNotSent) {
  const auto from = make_pool(8);
  const auto to = make_pool(8);
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, layers_of(to), receiving());
  PatchSender sender(a, layers_of(from), options_of());
  const std::uint32_t dropped[] = {1};
  from->drop_layers(dropped);
  const std::vector<SlotRange> some{{0, 16}};
  EXPECT_EQ(code_of([&] { sender.send_round(0, 1, some, {}, soon()); }), ErrorCode::not_resident);
}

TEST_P(Session, AGrowthOfTheSourceWaitsForTheTargets) {
  const auto from = make_pool(64);
  const auto to = make_pool(8);
  const auto [a, b] = make_channels(GetParam());
  RunningReceiver running(b, layers_of(to), receiving());
  PatchSender sender(a, layers_of(from), options_of());
  const std::vector<SlotRange> high{{60 * 16, 16}};
  sender.send_round(0, 1, high, {}, soon());
  EXPECT_EQ(code_of([&] { sender.wait_applied(1, shortly()); }), ErrorCode::timeout);
  to->grow(64);  // the pool says so by itself
  sender.wait_applied(1, soon());
  EXPECT_EQ(sender.verify(high, soon()), 32U);
  sender.finish(soon());
}

}  // namespace
}  // namespace pipelive
