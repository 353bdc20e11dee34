#include "pipelive/cuda/nccl_channel.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <future>
#include <thread>
#include <vector>

#include "nccl_pair.hpp"

namespace pipelive::cuda {
namespace {

using pipelive::test::shortly;
using pipelive::test::soon;
using test::FakeNccl;
using test::make_nccl;
using test::NcclEnd;
using ::testing::HasSubstr;

template <typename Work>
Error error_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {ErrorCode::device, ""};
}

void send_bulk(Channel& channel, std::byte value, std::size_t bytes, Deadline deadline = soon()) {
  channel.acquire(1, deadline)[0] = value;
  const Bulk bulk = channel.acquire_bulk(bytes, deadline);
  std::memset(bulk.data, static_cast<int>(value), bytes);
  channel.submit(1, deadline, bytes);
}

// The value of the next message; its payload must hold nothing else.
std::byte take_bulk(Channel& channel, std::size_t bytes, Deadline deadline = soon()) {
  const std::byte value = channel.receive(deadline)[0];
  const Bulk bulk = channel.received_bulk();
  EXPECT_EQ(bulk.bytes, bytes);
  for (std::size_t i = 0; i < bulk.bytes; ++i) {
    if (bulk.data[i] != value) {
      ADD_FAILURE() << "byte " << i << " of a payload differs";
      break;
    }
  }
  channel.release();
  return value;
}

// Whether no patch holds it; a communicator that is torn down may.
bool is_free(const DeviceTurn& turn) {
  const std::string holder = turn.holder();
  return holder.empty() || holder == "an NCCL communicator that ends";
}

struct NcclChannelTest : ::testing::Test {
  ~NcclChannelTest() override { EXPECT_EQ(fake.violations(), 0); }
  FakeNccl fake;
  NcclEnd left;
  NcclEnd right;
};

TEST_F(NcclChannelTest, PayloadsArriveBesideTheirMessages) {
  const auto [a, b] = make_nccl(left, right);
  std::thread sender([&a = a] {
    for (int i = 0; i < 50; ++i) send_bulk(*a, static_cast<std::byte>(i), 1 + i * 1000);
  });
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(take_bulk(*b, 1 + static_cast<std::size_t>(i) * 1000), static_cast<std::byte>(i));
  }
  sender.join();
  EXPECT_EQ(a->retries(), 0U);
  EXPECT_TRUE(is_free(*left.turn) && is_free(*right.turn));
}

// Both ends offer on the one communicator; each waits for the other's turn with its own in hand if
// the handshake were wrong.
TEST_F(NcclChannelTest, BothEndsOfferAtOnce) {
  const auto [a, b] = make_nccl(left, right);
  constexpr int kMessages = 40;
  const auto traffic = [](Channel& channel) {
    std::thread reader([&channel] {
      for (int i = 0; i < kMessages; ++i) {
        EXPECT_EQ(take_bulk(channel, 3000), static_cast<std::byte>(i));
      }
    });
    for (int i = 0; i < kMessages; ++i) send_bulk(channel, static_cast<std::byte>(i), 3000);
    reader.join();
  };
  std::thread other([&b = b, &traffic] { traffic(*b); });
  traffic(*a);
  other.join();
}

// A to B and B to A over two communicators of the same two devices: what a swap of layers does.
TEST_F(NcclChannelTest, TwoCommunicatorsInOppositeDirections) {
  const auto one = make_nccl(left, right);
  const auto two = make_nccl(right, left);
  constexpr int kMessages = 40;
  std::vector<std::thread> threads;
  for (const auto* pair : {&one, &two}) {
    threads.emplace_back([pair] {
      for (int i = 0; i < kMessages; ++i) send_bulk(*pair->a, static_cast<std::byte>(i), 5000);
    });
    threads.emplace_back([pair] {
      for (int i = 0; i < kMessages; ++i) {
        EXPECT_EQ(take_bulk(*pair->b, 5000), static_cast<std::byte>(i));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(NcclChannelTest, AnEngineThatHasTheTurnHoldsAPatchUpAndIsNotHeldUp) {
  const auto [a, b] = make_nccl(left, right);
  ASSERT_TRUE(right.turn->try_take("the engine"));
  auto sending = std::async(std::launch::async, [&a = a] { send_bulk(*a, std::byte{1}, 100); });
  auto receiving = std::async(std::launch::async, [&b = b] { return take_bulk(*b, 100); });
  while (a->retries() < 3) std::this_thread::yield();
  // The other device is free for its engine meanwhile, again and again.
  for (int i = 0; i < 5; ++i) {
    left.turn->take("the other engine", soon());
    left.turn->give();
  }
  right.turn->give();
  EXPECT_EQ(receiving.get(), std::byte{1});
  sending.get();
}

// Engines on both devices take both turns in opposite orders, as their collectives would, while
// patches go both ways.
TEST_F(NcclChannelTest, EnginesAndPatchesDoNotWaitInACircle) {
  const auto [a, b] = make_nccl(left, right);
  std::atomic<bool> over = false;
  const auto engine = [&over](DeviceTurn& turn) {
    while (!over) {
      turn.take("the engine", soon());
      std::this_thread::yield();
      turn.give();
    }
  };
  std::thread first([&] { engine(*left.turn); });
  std::thread second([&] { engine(*right.turn); });
  std::thread sender([&a = a] {
    for (int i = 0; i < 20; ++i) send_bulk(*a, static_cast<std::byte>(i), 1000);
  });
  for (int i = 0; i < 20; ++i) EXPECT_EQ(take_bulk(*b, 1000), static_cast<std::byte>(i));
  sender.join();
  over = true;
  first.join();
  second.join();
}

TEST_F(NcclChannelTest, ATurnThatIsNeverFreeIsADeadlineThatNamesItsHolder) {
  const auto [a, b] = make_nccl(left, right);
  ASSERT_TRUE(left.turn->try_take("an engine that hangs"));
  auto receiving = std::async(std::launch::async, [&b = b] {
    return error_of([&] { static_cast<void>(b->receive(soon())); });
  });
  const Error error = error_of([&, &a = a] {
    send_bulk(*a, std::byte{1}, 100, Deadline::after(std::chrono::milliseconds(50)));
  });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_THAT(error.what(), HasSubstr("an engine that hangs"));
  EXPECT_EQ(receiving.get().code(), ErrorCode::closed);
  EXPECT_TRUE(is_free(*right.turn));
  left.turn->give();
}

TEST_F(NcclChannelTest, AReceiverThatDoesNotReceiveIsADeadline) {
  const auto [a, b] = make_nccl(left, right);
  const Error error = error_of([&, &a = a] { send_bulk(*a, std::byte{1}, 100, shortly()); });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_THAT(error.what(), HasSubstr("did not answer the offer"));
  EXPECT_EQ(error_of([&, &b = b] { static_cast<void>(b->receive(soon())); }).code(),
            ErrorCode::closed);
}

TEST_F(NcclChannelTest, AReceiveThatEndsBeforeTheOfferIsContinued) {
  const auto [a, b] = make_nccl(left, right);
  EXPECT_FALSE(b->try_receive(shortly()));
  auto sending = std::async(std::launch::async, [&a = a] { send_bulk(*a, std::byte{9}, 100); });
  std::optional<std::span<const std::byte>> message;
  while (!message) message = b->try_receive(Deadline::after(std::chrono::nanoseconds(0)));
  EXPECT_EQ((*message)[0], std::byte{9});
  b->release();
  sending.get();
}

// Both ends wait for the same stalled operation under the same deadline. Whose clock runs out first
// aborts and closes; the other either runs out as well or sees the close.
TEST_F(NcclChannelTest, AStalledTransferIsAbortedAtBothEnds) {
  const auto [a, b] = make_nccl(left, right, 1 << 20, std::chrono::milliseconds(100));
  fake.set("stall", 1);
  auto receiving = std::async(std::launch::async, [&b = b] {
    return error_of([&] { static_cast<void>(b->receive(soon())); });
  });
  const Error sent = error_of([&, &a = a] { send_bulk(*a, std::byte{1}, 100); });
  const Error received = receiving.get();
  const auto ran_out = [](const Error& error, const char* what) {
    if (error.code() != ErrorCode::timeout) return false;
    EXPECT_THAT(error.what(), HasSubstr(what));
    return true;
  };
  const bool sender_ran_out = ran_out(sent, "sending by NCCL");
  const bool receiver_ran_out = ran_out(received, "receiving by NCCL");
  EXPECT_TRUE(sender_ran_out || receiver_ran_out) << sent.what() << "; " << received.what();
  EXPECT_TRUE(sender_ran_out || sent.code() == ErrorCode::closed) << sent.what();
  EXPECT_TRUE(receiver_ran_out || received.code() == ErrorCode::closed) << received.what();
  EXPECT_TRUE(is_free(*left.turn) && is_free(*right.turn));
}

TEST_F(NcclChannelTest, CancelEndsATransferAndFreesTheTurns) {
  for (const bool sender_cancels : {true, false}) {
    const auto [a, b] = make_nccl(left, right);
    fake.set("stall", 1);
    auto receiving = std::async(std::launch::async, [&b = b] {
      return error_of([&] { static_cast<void>(b->receive(soon())); }).code();
    });
    auto sending = std::async(std::launch::async, [&a = a] {
      return error_of([&] { send_bulk(*a, std::byte{1}, 100); }).code();
    });
    while (is_free(*left.turn) || is_free(*right.turn)) std::this_thread::yield();
    (sender_cancels ? a : b)->cancel();
    EXPECT_EQ((sender_cancels ? sending : receiving).get(), ErrorCode::cancelled);
    EXPECT_EQ((sender_cancels ? receiving : sending).get(), ErrorCode::closed);
    EXPECT_TRUE(is_free(*left.turn) && is_free(*right.turn));
    fake.set("stall", 0);
  }
}

TEST_F(NcclChannelTest, APeerThatDiesEndsATransfer) {
  auto [a, b] = make_nccl(left, right);
  fake.set("stall", 1);
  auto sending = std::async(std::launch::async, [&a = a] {
    return error_of([&] { send_bulk(*a, std::byte{1}, 100); }).code();
  });
  auto dying = std::async(std::launch::async,
                          [&b = b] { error_of([&] { static_cast<void>(b->receive(soon())); }); });
  while (is_free(*left.turn)) std::this_thread::yield();
  b->close();
  dying.get();
  b.reset();
  EXPECT_EQ(sending.get(), ErrorCode::closed);
}

TEST_F(NcclChannelTest, AnAsynchronousErrorFailsBothEnds) {
  const auto [a, b] = make_nccl(left, right);
  fake.set("async_error", 6);
  auto receiving = std::async(std::launch::async, [&b = b] {
    return error_of([&] { static_cast<void>(b->receive(soon())); }).code();
  });
  const ErrorCode code = error_of([&, &a = a] { send_bulk(*a, std::byte{1}, 100); }).code();
  EXPECT_EQ(code, ErrorCode::closed);
  EXPECT_EQ(receiving.get(), ErrorCode::closed);
}

// -- a peer that breaks the rules ---------------------------------------------------------------

struct HostileNccl : NcclChannelTest {
  // A channel whose peer is played by the test, over the base channel.
  HostileNccl() {
    const auto base = make_channels(pipelive::test::ChannelKind::shm, 1 << 20, {});
    const auto comms = test::make_comms(test::host_place(left.issuer, left.device),
                                        test::host_place(right.issuer, right.device));
    NcclChannel::Options options;
    options.comm = comms.a;
    options.turn = left.turn;
    options.out = std::make_shared<Staging>(left.device, StagingShape{65536, 1});
    options.in = std::make_shared<Staging>(left.device, StagingShape{65536, 1});
    options.window_bytes = 1 << 19;
    channel = std::make_unique<NcclChannel>(base.a, options);
    peer = base.b;
    other = comms.b;
  }
  void say(const Note& note, std::size_t message = 0) const {
    std::vector<std::byte> frame(FrameLink::kFrameBytes + message);
    std::memcpy(frame.data(), &note, sizeof note);
    send(*peer, frame, soon());
  }
  Error receive() const {
    return error_of([&] { static_cast<void>(channel->receive(soon())); });
  }

  std::unique_ptr<NcclChannel> channel;
  std::shared_ptr<Channel> peer;
  std::shared_ptr<NcclComm> other;
};

TEST_F(HostileNccl, APayloadLargerThanTheStagingIsRefused) {
  Note note;
  note.number = 1;
  note.bulk_bytes = 65537;
  say(note, 10);
  const Error error = receive();
  EXPECT_EQ(error.code(), ErrorCode::protocol);
  EXPECT_THAT(error.what(), HasSubstr("65537"));
}

TEST_F(HostileNccl, AMessageOutOfOrderIsRefused) {
  Note note;
  note.number = 2;
  note.bulk_bytes = 100;
  say(note, 10);
  EXPECT_EQ(receive().code(), ErrorCode::protocol);
}

TEST_F(HostileNccl, ADecisionOnAnotherOfferIsRefused) {
  Note note;
  note.number = 1;
  note.bulk_bytes = 100;
  say(note, 10);
  note.kind = Note::Kind::offer;
  note.attempt = 1;
  say(note);
  auto receiving = std::async(std::launch::async, [this] { return receive(); });
  // Its accept comes first.
  static_cast<void>(peer->receive(soon()));
  peer->release();
  note.kind = Note::Kind::go;
  note.attempt = 2;
  say(note);
  EXPECT_EQ(receiving.get().code(), ErrorCode::protocol);
  EXPECT_TRUE(is_free(*left.turn));
}

// However long the receiver may wait for messages: its device's engine waits for the turn.
TEST_F(HostileNccl, APeerThatFallsSilentDoesNotKeepTheTurn) {
  Note note;
  note.number = 1;
  note.bulk_bytes = 100;
  say(note, 10);
  note.kind = Note::Kind::offer;
  note.attempt = 1;
  say(note);
  const Error error = error_of(
      [this] { static_cast<void>(channel->receive(Deadline::after(std::chrono::hours(24)))); });
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_THAT(error.what(), HasSubstr("it did not go on"));
  EXPECT_TRUE(is_free(*left.turn));
}

TEST_F(HostileNccl, AnAnswerToNoOfferIsRefused) {
  Note note;
  note.kind = Note::Kind::accept;
  note.number = 1;
  note.attempt = 1;
  say(note);
  EXPECT_EQ(receive().code(), ErrorCode::protocol);
}

TEST_F(HostileNccl, AFloodOfOffersIsRefused) {
  Note note;
  note.kind = Note::Kind::offer;
  note.number = 1;
  note.attempt = 1;
  say(note);
  say(note);
  EXPECT_EQ(receive().code(), ErrorCode::protocol);
}

TEST_F(HostileNccl, WhatIsNoFrameIsRefused) {
  send(*peer, std::vector<std::byte>(63), soon());
  EXPECT_EQ(receive().code(), ErrorCode::protocol);
}

TEST_F(HostileNccl, AMessageBeyondTheWindowIsRefused) {
  say(Note{}, (1 << 19) - 63);
  EXPECT_EQ(receive().code(), ErrorCode::protocol);
}

TEST_F(HostileNccl, ACreditThatWasNotOwedIsRefused) {
  Note note;
  note.kind = Note::Kind::credit;
  note.bytes = 1;
  say(note);
  EXPECT_EQ(receive().code(), ErrorCode::protocol);
}

}  // namespace
}  // namespace pipelive::cuda
