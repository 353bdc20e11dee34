// A receiver that is sent messages by hand: rules of generation, order and refusal.
#include <gtest/gtest.h>

#include <limits>

#include "migration/session.hpp"
#include "pipelive/migration/generations.hpp"

namespace pipelive {
namespace {

using test::ChannelKind;
using test::code_of;
using test::EndMemory;
using test::make_channels;
using test::raw_data;
using test::RunningReceiver;
using test::shortly;
using test::small_spec;
using test::soon;
using wire::Kind;
using wire::Record;

constexpr std::uint64_t kEpoch = 7;
constexpr std::uint64_t kBlocks = 32;

class Receiver : public ::testing::Test {
 protected:
  Receiver()
      : memory(small_spec(), {2, 5}, kBlocks), slot_bytes(memory.layers[0]->layout.slot_bytes()) {
    auto channels = make_channels(ChannelKind::shm);
    wire_end = channels.a;
    PatchReceiver::Options options;
    options.epoch = kEpoch;
    running = std::make_unique<RunningReceiver>(channels.b, memory.patch_layers(), options,
                                                std::vector<PatchRegion>{{9, region, nullptr}});
  }

  static wire::Header header(Kind kind, std::uint64_t round = 0, std::int64_t through = 0,
                             std::uint32_t index = 0) {
    wire::Header head;
    head.kind = kind;
    head.epoch = kEpoch;
    head.round = round;
    head.through_seq = through;
    head.index = index;
    return head;
  }

  void put(std::span<const std::byte> message) { send(*wire_end, message, soon()); }
  void hello() {
    const std::uint32_t layers[] = {2, 5};
    put(wire::small_message(header(Kind::hello),
                            wire::write_hello(wire::make_hello(small_spec(), false, layers))));
  }
  void data(const wire::Header& head, const std::vector<Record>& records, std::byte fill) {
    std::uint64_t slots = 0;
    for (const Record& record : records) slots += record.count;
    put(raw_data(head, records, std::vector<std::byte>(slots * slot_bytes, fill)));
  }
  void round_end(std::uint64_t round, std::int64_t through, const wire::RoundTotals& totals,
                 const std::vector<std::uint32_t>& layers = {2, 5}) {
    put(wire::small_message(header(Kind::round_end, round, through),
                            wire::write_round_end(totals, layers)));
  }
  void finish(std::uint64_t rounds) { put(wire::small_message(header(Kind::finish, rounds))); }

  std::byte at(std::size_t place, std::uint64_t slot) const {
    const std::vector<std::byte> bytes = memory.layers[place]->slot(slot);
    EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [&](std::byte b) { return b == bytes[0]; }))
        << "slot " << slot << " is torn";
    return bytes[0];
  }
  // What run threw; the source is told the same.
  Error failure() {
    const auto outcome = running->outcome();
    if (!outcome) {
      ADD_FAILURE() << "run returned";
      return {ErrorCode::device, ""};
    }
    return *outcome;
  }

  EndMemory memory;
  std::size_t slot_bytes;
  std::vector<std::byte> region = std::vector<std::byte>(100);
  std::shared_ptr<Channel> wire_end;
  std::unique_ptr<RunningReceiver> running;
};

TEST_F(Receiver, AnOlderGenerationNeverOverwritesANewerOne) {
  hello();
  // Round 1 arrives before round 0; they overlap in slots 6 to 9.
  data(header(Kind::data, 1, 20), {{6, 2, 10, 2}}, std::byte{2});
  round_end(1, 20, {1, 1, 10});
  data(header(Kind::data, 0, 10), {{0, 1, 10, 2}}, std::byte{1});
  EXPECT_EQ(code_of([&] { running->receiver.wait_applied(20, shortly()); }), ErrorCode::timeout);
  EXPECT_EQ(running->receiver.applied_through(), -1);
  round_end(0, 10, {1, 1, 10});
  running->receiver.wait_applied(20, soon());
  for (std::uint64_t s = 0; s < 16; ++s) {
    EXPECT_EQ(at(0, s), s < 6 ? std::byte{1} : std::byte{2}) << s;
    EXPECT_EQ(at(1, s), std::byte{0}) << s;
  }
  EXPECT_EQ(running->receiver.stats().overtaken_slots, 4U);
  finish(2);
  EXPECT_FALSE(running->outcome());
}

TEST_F(Receiver, ARangeWithHolesOfNewerSlotsIsWrittenAround) {
  hello();
  std::vector<Record> newer;
  for (std::uint64_t s = 0; s < 40; s += 3) newer.push_back({s, 2, 1, 5});
  data(header(Kind::data, 1, 2), newer, std::byte{9});
  data(header(Kind::data, 0, 1), {{0, 1, 40, 5}, {50, 1, 2, 5}}, std::byte{4});
  round_end(0, 1, {1, 2, 42});
  round_end(1, 2, {1, newer.size(), newer.size()});
  running->receiver.wait_applied(2, soon());
  for (std::uint64_t s = 0; s < 40; ++s)
    EXPECT_EQ(at(1, s), s % 3 == 0 ? std::byte{9} : std::byte{4});
  EXPECT_EQ(at(1, 50), std::byte{4});
}

TEST_F(Receiver, RunsInPartsByRounds) {
  auto channels = make_channels(ChannelKind::shm);
  wire_end = channels.a;
  PatchReceiver::Options options;
  options.epoch = kEpoch;
  PatchReceiver receiver(channels.b, memory.patch_layers(), options);
  hello();
  data(header(Kind::data, 0, 1), {{0, 1, 4, 2}}, std::byte{1});
  auto bulk = std::async(std::launch::async, [&] { return receiver.run(soon(), 1); });
  receiver.wait_applied(-1, soon());
  while (receiver.stats().messages < 2) std::this_thread::yield();
  // It runs already.
  EXPECT_EQ(code_of([&] { receiver.run(soon()); }), ErrorCode::invalid_argument);
  round_end(0, 1, {1, 1, 4});
  EXPECT_FALSE(bulk.get());
  EXPECT_EQ(receiver.rounds_applied(), 1U);
  EXPECT_FALSE(receiver.run(soon(), 1));  // they are applied; nothing is waited for
  data(header(Kind::data, 1, 2), {{4, 2, 4, 2}}, std::byte{2});
  round_end(1, 2, {1, 1, 4});
  finish(2);
  EXPECT_TRUE(receiver.run(soon()));
  EXPECT_EQ(at(0, 0), std::byte{1});
  EXPECT_EQ(at(0, 4), std::byte{2});
  std::string text;
  EXPECT_EQ(code_of([&] { receiver.run(soon()); }, &text), ErrorCode::invalid_argument);
  EXPECT_NE(text.find("after the source had finished"), std::string::npos) << text;
}

TEST_F(Receiver, DuplicatedAndReorderedMessagesAreHarmless) {
  hello();
  data(header(Kind::data, 0, 5, 1), {{8, 1, 4, 2}}, std::byte{2});
  round_end(0, 5, {2, 2, 8});
  data(header(Kind::data, 0, 5, 1), {{8, 1, 4, 2}}, std::byte{77});  // a duplicate changes nothing
  round_end(0, 5, {2, 2, 8});
  data(header(Kind::data, 0, 5, 0), {{0, 1, 4, 2}}, std::byte{1});
  running->receiver.wait_applied(5, soon());
  data(header(Kind::data, 0, 5, 0), {{0, 1, 4, 2}}, std::byte{77});  // of a round that is over
  round_end(0, 5, {2, 2, 8});
  finish(1);
  EXPECT_FALSE(running->outcome());
  EXPECT_EQ(at(0, 0), std::byte{1});
  EXPECT_EQ(at(0, 8), std::byte{2});
  EXPECT_EQ(running->receiver.stats().duplicates, 2U);
  EXPECT_EQ(running->receiver.applied_through(), 5);
}

TEST_F(Receiver, ADroppedMessageHoldsTheGateAndIsNamedAtTheEnd) {
  hello();
  data(header(Kind::data, 0, 5, 0), {{0, 1, 4, 2}}, std::byte{1});
  round_end(0, 5, {2, 2, 8});
  EXPECT_EQ(code_of([&] { running->receiver.wait_applied(5, shortly()); }), ErrorCode::timeout);
  finish(1);
  const Error error = failure();
  EXPECT_EQ(error.code(), ErrorCode::protocol);
  EXPECT_NE(std::string(error.what()).find("round 0 has 1 of 2 messages"), std::string::npos)
      << error.what();
}

TEST_F(Receiver, ALostRoundHoldsTheGate) {
  hello();
  round_end(1, 9, {0, 0, 0});
  EXPECT_EQ(code_of([&] { running->receiver.wait_applied(9, shortly()); }), ErrorCode::timeout);
  round_end(0, 5, {0, 0, 0});
  running->receiver.wait_applied(9, soon());
}

TEST_F(Receiver, NothingIsWrittenOfAMessageWithOneBadRecord) {
  hello();
  data(header(Kind::data), {{0, 1, 4, 2}, {4 * kBlocks - 1, 1, 2, 2}}, std::byte{1});
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
  EXPECT_EQ(at(0, 0), std::byte{0});
}

struct Bad {
  const char* name;
  std::vector<Record> records;
  std::int64_t payload_change;  // bytes more than the records name
};

class BadRecords : public Receiver, public ::testing::WithParamInterface<Bad> {};

INSTANTIATE_TEST_SUITE_P(
    All, BadRecords,
    ::testing::Values(Bad{"no_records", {}, 0}, Bad{"empty_record", {{0, 1, 0, 2}}, 0},
                      Bad{"foreign_layer", {{0, 1, 1, 3}}, 0},
                      Bad{"every_layer", {{0, 1, 1, wire::kEveryLayer}}, 0},
                      Bad{"past_the_end", {{4 * kBlocks, 1, 1, 2}}, 0},
                      Bad{"across_the_end", {{4 * kBlocks - 1, 1, 2, 2}}, 0},
                      Bad{"begin_overflows", {{~std::uint64_t{0}, 1, 1, 2}}, 0},
                      Bad{"end_overflows", {{~std::uint64_t{0} - 1, 1, 4, 2}}, 0},
                      Bad{"generation_of_the_future", {{0, 2, 1, 2}}, 0},
                      Bad{"payload_short", {{0, 1, 2, 2}}, -1},
                      Bad{"payload_long", {{0, 1, 2, 2}}, 1},
                      Bad{"payload_one_slot_less", {{0, 1, 2, 2}}, -64}),
    [](const auto& bad) { return std::string(bad.param.name); });

TEST_P(BadRecords, AreRefusedAndTheSourceIsTold) {
  hello();
  std::int64_t bytes = GetParam().payload_change;
  for (const Record& record : GetParam().records) {
    bytes += static_cast<std::int64_t>(record.count * slot_bytes);
  }
  put(raw_data(header(Kind::data), GetParam().records,
               std::vector<std::byte>(static_cast<std::size_t>(bytes), std::byte{1})));
  const Error error = failure();
  EXPECT_EQ(error.code(), ErrorCode::protocol);
  static_cast<void>(wire_end->receive(soon()));  // its hello
  wire_end->release();
  wire::Message message;
  wire::open_message(wire_end->receive(soon()), nullptr, message);
  EXPECT_EQ(message.header.kind, Kind::abort);
  const std::string reason(reinterpret_cast<const char*>(message.payload.data()),
                           message.payload.size());
  EXPECT_EQ(reason, error.what());
  EXPECT_EQ(code_of([&] { running->receiver.wait_applied(0, soon()); }), ErrorCode::protocol);
}

TEST_F(Receiver, TheFirstMessageIsAHello) {
  round_end(0, 1, {0, 0, 0});
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
}

TEST_F(Receiver, MessagesOfAnEarlierMigrationAreRefused) {
  hello();
  wire::Header replayed = header(Kind::data);
  replayed.epoch = kEpoch - 1;
  data(replayed, {{0, 1, 4, 2}}, std::byte{1});
  const Error error = failure();
  EXPECT_EQ(error.code(), ErrorCode::protocol);
  EXPECT_NE(std::string(error.what()).find("epoch 6, expected 7"), std::string::npos);
  EXPECT_EQ(at(0, 0), std::byte{0});
}

TEST_F(Receiver, ContradictoryRoundsAreRefused) {
  hello();
  data(header(Kind::data, 0, 5, 0), {{0, 1, 4, 2}}, std::byte{1});
  round_end(0, 6, {1, 1, 4});
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
}

TEST_F(Receiver, TotalsThatDisagreeAreRefused) {
  hello();
  data(header(Kind::data, 0, 5, 0), {{0, 1, 4, 2}}, std::byte{1});
  round_end(0, 5, {1, 1, 5});
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
}

TEST_F(Receiver, RoundsFarAheadAreRefused) {
  hello();
  round_end(RoundLedger::kMostOpenRounds, 5, {0, 0, 0});
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
}

TEST_F(Receiver, AMissingChecksumIsRefused) {
  const std::uint32_t layers[] = {2, 5};
  wire::Header head = header(Kind::hello);
  head.flags = wire::kBodyChecksum;
  put(wire::small_message(head, wire::write_hello(wire::make_hello(small_spec(), true, layers))));
  data(header(Kind::data), {{0, 1, 4, 2}}, std::byte{1});
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
  EXPECT_EQ(at(0, 0), std::byte{0});
}

TEST_F(Receiver, ACorruptBitIsSeen) {
  const std::uint32_t layers[] = {2, 5};
  wire::Header head = header(Kind::hello);
  head.flags = wire::kBodyChecksum;
  put(wire::small_message(head, wire::write_hello(wire::make_hello(small_spec(), true, layers))));
  std::vector<std::byte> message = wire::small_message(
      [&] {
        wire::Header end = header(Kind::round_end, 0, 5);
        end.flags = wire::kBodyChecksum;
        return end;
      }(),
      wire::write_round_end({0, 0, 0}, layers));
  message.back() ^= std::byte{16};
  put(message);
  EXPECT_EQ(failure().code(), ErrorCode::corrupt);
}

TEST_F(Receiver, RegionsAreBounded) {
  for (const auto& [offset, size] : {std::pair<std::uint64_t, std::size_t>{0, 101},
                                     {100, 1},
                                     {101, 0},
                                     {1, 10},
                                     {~std::uint64_t{0}, 2}}) {
    Receiver::SetUp();
    auto channels = make_channels(ChannelKind::shm);
    PatchReceiver::Options options;
    options.epoch = kEpoch;
    RunningReceiver other(channels.b, memory.patch_layers(), options, {{9, region, nullptr}});
    wire_end = channels.a;
    hello();
    wire::Header head = header(Kind::region);
    head.id = 9;
    head.offset = offset;
    put(wire::small_message(head, std::vector<std::byte>(size)));
    EXPECT_EQ(other.outcome().value().code(), ErrorCode::protocol) << offset;
  }
}

TEST_F(Receiver, RepeatedRegionPiecesAreHarmlessAndAMissingOneIsSeen) {
  hello();
  const auto piece = [&](std::uint64_t offset, std::size_t size, std::byte fill) {
    wire::Header head = header(Kind::region);
    head.id = 9;
    head.offset = offset;
    put(wire::small_message(head, std::vector<std::byte>(size, fill)));
  };
  wire::Header end = header(Kind::region_end);
  end.id = 9;
  end.offset = 100;
  piece(0, 60, std::byte{1});
  piece(0, 60, std::byte{1});
  piece(60, 40, std::byte{2});
  put(wire::small_message(end));
  running->receiver.wait_region(9, soon());
  piece(0, 60, std::byte{3});  // complete, so it stays as it is
  put(wire::small_message(end));
  finish(0);
  EXPECT_FALSE(running->outcome());
  EXPECT_EQ(region[0], std::byte{1});
  EXPECT_EQ(region[99], std::byte{2});
}

TEST_F(Receiver, AFinishThatOvertakesARoundIsRefused) {
  hello();
  finish(1);  // as if it had been reordered before the only round
  const Error error = failure();
  EXPECT_EQ(error.code(), ErrorCode::protocol);
  EXPECT_NE(std::string(error.what()).find("ends 1 rounds, complete are 0"), std::string::npos)
      << error.what();
}

TEST_F(Receiver, ARegionEndTooEarlyIsRefused) {
  hello();
  wire::Header end = header(Kind::region_end);
  end.id = 9;
  end.offset = 100;
  put(wire::small_message(end));
  EXPECT_EQ(failure().code(), ErrorCode::protocol);
}

TEST_F(Receiver, CapacityHoldsRecordsBackUntilItGrows) {
  running->receiver.set_capacity(4);
  hello();
  data(header(Kind::data, 0, 5, 0), {{0, 1, 4, 2}, {16, 1, 4, 2}}, std::byte{1});
  round_end(0, 5, {1, 2, 8});
  EXPECT_EQ(code_of([&] { running->receiver.wait_applied(5, shortly()); }), ErrorCode::timeout);
  EXPECT_EQ(at(0, 0), std::byte{0});
  running->receiver.set_capacity(5);
  running->receiver.wait_applied(5, soon());
  EXPECT_EQ(at(0, 16), std::byte{1});
}

TEST_F(Receiver, RecordsOfBeforeAResizeAreDroppedBeyondIt) {
  running->receiver.set_capacity(4, 6);  // the stamp of step 6 took blocks 4 and later away
  hello();
  data(header(Kind::data, 0, 5, 0), {{14, 1, 4, 2}, {20, 1, 4, 2}}, std::byte{1});
  round_end(0, 5, {1, 2, 8});
  running->receiver.wait_applied(5, soon());
  EXPECT_EQ(at(0, 15), std::byte{1});
  EXPECT_EQ(at(0, 16), std::byte{0});
  EXPECT_EQ(at(0, 20), std::byte{0});
  EXPECT_EQ(running->receiver.stats().dropped_slots, 6U);
  running->receiver.set_capacity(kBlocks, 9);
  data(header(Kind::data, 1, 9, 0), {{16, 2, 8, 2}}, std::byte{3});
  round_end(1, 9, {1, 1, 8});
  running->receiver.wait_applied(9, soon());
  EXPECT_EQ(at(0, 20), std::byte{3});
}

TEST_F(Receiver, CancelEndsAWaitForCapacity) {
  running->receiver.set_capacity(1);
  hello();
  data(header(Kind::data, 0, 5, 0), {{16, 1, 4, 2}}, std::byte{1});
  while (running->receiver.stats().messages < 1U) std::this_thread::yield();
  running->receiver.cancel();
  EXPECT_EQ(failure().code(), ErrorCode::cancelled);
}

TEST_F(Receiver, RandomMessagesNeverCrash) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    auto channels = make_channels(ChannelKind::shm, 65536);
    EndMemory plain(small_spec(), {2, 5}, kBlocks);
    PatchReceiver::Options options;
    options.epoch = kEpoch;
    std::vector<std::byte> place(100);
    PatchReceiver receiver(channels.b, plain.patch_layers(), options, {{9, place, nullptr}});
    const std::uint32_t layers[] = {2, 5};
    const auto number = [&](std::uint64_t usual) -> std::uint64_t {
      switch (random() % 8) {
        case 0:
          return random();
        case 1:
          return ~std::uint64_t{0} - random() % 4;
        default:
          return random() % usual;
      }
    };
    send(*channels.a,
         wire::small_message(header(Kind::hello),
                             wire::write_hello(wire::make_hello(small_spec(), false, layers))),
         soon());
    for (int i = 0; i < 12; ++i) {
      std::vector<Record> records;
      const auto kind = static_cast<Kind>(1 + random() % 10);
      std::uint64_t slots = 0;
      if (kind == Kind::data || kind == Kind::verify_request || random() % 8 == 0) {
        for (std::uint64_t r = random() % 4; r > 0; --r) {
          const std::uint32_t layer = kind == Kind::verify_request
                                          ? wire::kEveryLayer
                                          : static_cast<std::uint32_t>(random() % 3 == 0 ? 2 : 5);
          records.push_back(
              {number(4 * kBlocks), number(3), static_cast<std::uint32_t>(number(9)), layer});
          slots += records.back().count;
        }
      }
      wire::Header head = header(kind, number(3), static_cast<std::int64_t>(random() % 3),
                                 static_cast<std::uint32_t>(number(3)));
      head.id = number(11);
      head.offset = number(120);
      const std::size_t payload =
          slots < 1000 && random() % 4 != 0 ? slots * slot_bytes : number(2) % 300;
      send(*channels.a, raw_data(head, records, std::vector<std::byte>(payload % 60000)), soon());
    }
    channels.a->close();
    const ErrorCode code = code_of([&] {
      receiver.run(Deadline::after(std::chrono::milliseconds(5)));
      throw Error(ErrorCode::closed, "finished");
    });
    EXPECT_TRUE(code == ErrorCode::protocol || code == ErrorCode::closed ||
                code == ErrorCode::timeout || code == ErrorCode::not_resident)
        << to_string(code);
    // The guard behind the last block is untouched.
    for (const auto& layer : plain.layers) {
      for (std::size_t i = kBlocks * layer->stride; i < layer->bytes.size(); ++i) {
        ASSERT_EQ(layer->bytes[i], std::byte{0});
      }
    }
  }
}

TEST(Generations, ClaimsSplitAroundNewerSlotsAndJoinOverChunks) {
  Generations generations(20000);
  std::vector<SlotRange> fresh;
  generations.claim({4000, 200}, 5, fresh);
  EXPECT_EQ(fresh, (std::vector<SlotRange>{{4000, 200}}));
  generations.claim({3990, 20}, 3, fresh);
  EXPECT_EQ(fresh, (std::vector<SlotRange>{{3990, 10}}));
  generations.claim({4090, 10}, 9, fresh);
  EXPECT_EQ(fresh, (std::vector<SlotRange>{{4090, 10}}));
  generations.claim({4000, 9000}, 6, fresh);
  EXPECT_EQ(fresh, (std::vector<SlotRange>{{4000, 90}, {4100, 8900}}));
  EXPECT_EQ(generations.at(4095), 9U);
  EXPECT_EQ(generations.at(4100), 6U);
  EXPECT_EQ(generations.at(3995), 3U);
  EXPECT_EQ(generations.at(19999), 0U);
  generations.claim({4090, 10}, 8, fresh);
  EXPECT_TRUE(fresh.empty());
}

}  // namespace
}  // namespace pipelive
