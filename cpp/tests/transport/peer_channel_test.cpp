#include "pipelive/transport/peer_channel.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <thread>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/device/fault_device.hpp"
#include "transport/channel_pair.hpp"

namespace pipelive {
namespace {

using test::make_peers;
using test::shortly;
using test::soon;
using ::testing::HasSubstr;

constexpr std::size_t kPiece = 4096;
constexpr StagingShape kShape{kPiece, 3};

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

struct PeerChannelTest : ::testing::Test {
  std::shared_ptr<HostDevice> left = std::make_shared<HostDevice>();
  std::shared_ptr<HostDevice> right = std::make_shared<HostDevice>();
};

TEST_F(PeerChannelTest, PayloadsArriveBesideTheirMessagesUnderBackPressure) {
  const auto [a, b] = make_peers(left, right, 65536, kShape);
  constexpr int kMessages = 500;
  std::thread sender([&a = a] {
    for (int i = 0; i < kMessages; ++i) {
      send_bulk(*a, static_cast<std::byte>(i), 1 + static_cast<std::size_t>(i) % kPiece);
    }
  });
  for (int i = 0; i < kMessages; ++i) {
    ASSERT_EQ(b->receive(soon())[0], static_cast<std::byte>(i));
    const Bulk bulk = b->received_bulk();
    ASSERT_EQ(bulk.bytes, 1 + static_cast<std::size_t>(i) % kPiece);
    for (std::size_t at = 0; at < bulk.bytes; ++at) ASSERT_EQ(bulk.data[at], std::byte(i & 255));
    b->release();
  }
  sender.join();
  EXPECT_EQ(a->stats().bytes_sent, b->stats().bytes_received);
}

TEST_F(PeerChannelTest, PiecesStayTheReceiversUntilItReleasesThem) {
  const auto [a, b] = make_peers(left, right, 65536, kShape);
  for (int i = 0; i < 3; ++i) send_bulk(*a, static_cast<std::byte>(i), kPiece);
  static_cast<void>(a->acquire(1, soon()));
  EXPECT_EQ(error_of([&, &a = a] { static_cast<void>(a->acquire_bulk(1, shortly())); }).code(),
            ErrorCode::timeout);
  EXPECT_EQ(b->receive(soon())[0], std::byte{0});
  EXPECT_EQ(b->received_bulk().data[kPiece - 1], std::byte{0});
  b->release();
  EXPECT_EQ(a->acquire_bulk(10, soon()).bytes, 10U);
  a->submit(0, soon());  // both are given back, and nothing arrives
  send_bulk(*a, std::byte{7}, 5);
  for (const int expected : {1, 2, 7}) {
    EXPECT_EQ(b->receive(soon())[0], static_cast<std::byte>(expected));
    b->release();
  }
}

TEST_F(PeerChannelTest, ASampleIsReadWhereItWasPut) {
  Staging own(left, kShape);
  const auto peer = test::mapped(right, own);
  const std::array sample{std::byte{1}, std::byte{2}, std::byte{3}, std::byte{5}};
  EXPECT_FALSE(peer->has_sample(sample, {}, nullptr, soon()));
  own.put_sample(sample, {}, nullptr, soon());
  EXPECT_TRUE(peer->has_sample(sample, {}, nullptr, soon()));
  for (const std::size_t at : {std::size_t{0}, kPiece + 3, 2 * kPiece - 1, 3 * kPiece - 4}) {
    std::byte& byte = own.piece(0)[at];
    byte ^= std::byte{0x80};
    EXPECT_FALSE(peer->has_sample(sample, {}, nullptr, soon())) << at;
    byte ^= std::byte{0x80};
  }
  EXPECT_TRUE(peer->has_sample(sample, {}, nullptr, soon()));
}

TEST_F(PeerChannelTest, SamplesOfNoBytesOrTooManyAreRefused) {
  Staging own(left, kShape);
  const auto peer = test::mapped(right, own);
  for (const std::size_t bytes : {std::size_t{0}, kPiece / 2 + 1}) {
    const std::vector<std::byte> sample(bytes);
    EXPECT_EQ(error_of([&] { own.put_sample(sample, {}, nullptr, soon()); }).code(),
              ErrorCode::invalid_argument);
    EXPECT_EQ(
        error_of([&] { static_cast<void>(peer->has_sample(sample, {}, nullptr, soon())); }).code(),
        ErrorCode::invalid_argument);
  }
  const std::vector<std::byte> half(kPiece / 2, std::byte{9});
  own.put_sample(half, {}, nullptr, soon());
  EXPECT_TRUE(peer->has_sample(half, {}, nullptr, soon()));
}

TEST_F(PeerChannelTest, CallsOutOfOrderAreRefused) {
  const auto [a, b] = make_peers(left, right, 65536, kShape);
  const auto refused = [](const auto& work) {
    return error_of(work).code() == ErrorCode::invalid_argument;
  };
  EXPECT_TRUE(refused([&, &a = a] { static_cast<void>(a->acquire_bulk(1, soon())); }));
  static_cast<void>(a->acquire(10, soon()));
  EXPECT_TRUE(refused([&, &a = a] { static_cast<void>(a->acquire_bulk(kPiece + 1, soon())); }));
  EXPECT_TRUE(refused([&, &a = a] { static_cast<void>(a->acquire_bulk(0, soon())); }));
  static_cast<void>(a->acquire_bulk(100, soon()));
  EXPECT_TRUE(refused([&, &a = a] { static_cast<void>(a->acquire_bulk(1, soon())); }));
  EXPECT_TRUE(refused([&, &a = a] { a->submit(10, soon(), 101); }));
  EXPECT_TRUE(refused([&, &a = a] { a->submit(0, soon(), 1); }));
  a->submit(10, soon());  // the place beside it stays behind
  EXPECT_EQ(b->receive(soon()).size(), 10U);
  EXPECT_EQ(b->received_bulk().bytes, 0U);
  EXPECT_TRUE(refused([&, &b = b] { static_cast<void>(b->receive(soon())); }));
  b->release();
  EXPECT_TRUE(refused([&, &b = b] { static_cast<void>(b->received_bulk()); }));
}

TEST_F(PeerChannelTest, AnEndWithoutStagingSendsNoneButReceives) {
  const auto base = test::make_channels(test::ChannelKind::shm, 1 << 20, {});
  PeerChannel::Options sending;
  sending.device = left;
  sending.own = std::make_shared<Staging>(left, kShape);
  PeerChannel::Options receiving;
  receiving.device = right;
  receiving.peer = test::mapped(right, *sending.own);
  sending.window_bytes = receiving.window_bytes = 65536;
  PeerChannel a(base.a, std::move(sending));
  PeerChannel b(base.b, std::move(receiving));
  EXPECT_EQ(b.max_bulk_bytes(), 0U);
  send_bulk(a, std::byte{5}, 100);
  EXPECT_EQ(b.receive(soon())[0], std::byte{5});
  b.release();
}

// A device that fails between a piece's filling and its message must not send the message.
TEST_F(PeerChannelTest, ADeviceErrorEndsTheChannel) {
  const auto faulty = std::make_shared<FaultDevice>(left);
  const auto [a, b] = make_peers(faulty, right, 65536, kShape);
  faulty->fail(DeviceCall::record, 1);
  EXPECT_EQ(error_of([&, &a = a] { send_bulk(*a, std::byte{1}, 10); }).code(), ErrorCode::device);
  EXPECT_EQ(error_of([&, &a = a] { send_bulk(*a, std::byte{1}, 10); }).code(), ErrorCode::device);
  EXPECT_EQ(error_of([&, &b = b] { static_cast<void>(b->receive(soon())); }).code(),
            ErrorCode::closed);
}

TEST_F(PeerChannelTest, StagingIsGivenBackWholly) {
  const DeviceUsage before = left->usage();
  for (int i = 0; i < 3; ++i) {
    const auto peers = make_peers(left, right, 65536, kShape);
    send_bulk(*peers.a, std::byte{1}, 10);
  }
  EXPECT_EQ(left->usage(), before);
  EXPECT_EQ(right->usage(), before);
}

TEST(StagingTest, ShapesThatMakeNoSenseAreRefused) {
  const auto device = std::make_shared<HostDevice>();
  for (const StagingShape shape :
       {StagingShape{0, 1}, StagingShape{4096, 0}, StagingShape{100, 1}, StagingShape{4096, 1025},
        StagingShape{std::size_t{1} << 34, 2}}) {
    EXPECT_EQ(error_of([&] { Staging(device, shape); }).code(), ErrorCode::invalid_argument);
  }
}

TEST(StagingTest, AFailureWhileItIsMadeLeavesNothing) {
  const auto host = std::make_shared<HostDevice>();
  const auto device = std::make_shared<FaultDevice>(host);
  for (const DeviceCall call : {DeviceCall::create_pages, DeviceCall::reserve, DeviceCall::map}) {
    device->fail(call, 1);
    EXPECT_EQ(error_of([&] { Staging(device, kShape); }).code(), ErrorCode::device);
    EXPECT_EQ(host->usage(), DeviceUsage{});
  }
}

// -- a peer that breaks the rules ---------------------------------------------------------------

struct HostilePeer : PeerChannelTest {
  HostilePeer() {
    const auto base = test::make_channels(test::ChannelKind::shm, 1 << 20, {});
    theirs = std::make_unique<Staging>(right, kShape);
    PeerChannel::Options options;
    options.device = left;
    options.own = std::make_shared<Staging>(left, kShape);
    options.peer = test::mapped(left, *theirs);
    options.window_bytes = 65536;
    channel = std::make_unique<PeerChannel>(base.a, std::move(options));
    peer = base.b;
  }
  void say(const Note& note, std::size_t message = 0) const {
    std::vector<std::byte> frame(FrameLink::kFrameBytes + message);
    std::memcpy(frame.data(), &note, sizeof note);
    send(*peer, frame, soon());
  }
  void expect_refusal(const char* text) const {
    const Error error = error_of([&] { static_cast<void>(channel->receive(soon())); });
    EXPECT_EQ(error.code(), ErrorCode::protocol);
    EXPECT_THAT(error.what(), HasSubstr(text));
    // And for good.
    EXPECT_EQ(error_of([&] { static_cast<void>(channel->acquire(1, soon())); }).code(),
              ErrorCode::protocol);
  }
  static Note bulk(std::uint32_t piece, std::uint64_t bytes) {
    Note note;
    note.number = 1;
    note.piece = piece;
    note.bulk_bytes = bytes;
    return note;
  }

  std::unique_ptr<Staging> theirs;
  std::unique_ptr<PeerChannel> channel;
  std::shared_ptr<Channel> peer;
};

TEST_F(HostilePeer, APieceThatIsNotThereIsRefused) {
  say(bulk(3, 10), 5);
  expect_refusal("piece 3 of its 3");
}

TEST_F(HostilePeer, MoreThanAPieceIsRefused) {
  say(bulk(0, kPiece + 1), 5);
  expect_refusal("4097 bytes");
}

TEST_F(HostilePeer, TheReleaseOfAPieceThatItDoesNotHaveIsRefused) {
  Note note;
  note.kind = Note::Kind::released;
  note.number = 1;
  say(note);
  expect_refusal("releases piece 0 of message 1");
}

TEST_F(HostilePeer, TheReleaseOfAPieceThatIsBeingFilledIsRefused) {
  static_cast<void>(channel->acquire(1, soon()));
  static_cast<void>(channel->acquire_bulk(10, soon()));
  Note note;
  note.kind = Note::Kind::released;
  note.number = ~std::uint64_t{0};
  say(note);
  const Error error = error_of([&] { static_cast<void>(channel->receive(soon())); });
  EXPECT_EQ(error.code(), ErrorCode::protocol);
}

TEST_F(HostilePeer, ANoteOfTheOtherTransportIsRefused) {
  Note note;
  note.kind = Note::Kind::accept;
  say(note);
  expect_refusal("takes no note of kind 5");
}

TEST_F(HostilePeer, AKindThatIsNotThereIsRefused) {
  Note note;
  note.kind = static_cast<Note::Kind>(99);
  say(note);
  expect_refusal("kind 99");
}

TEST_F(HostilePeer, ANoteWithAMessageIsRefused) {
  Note note;
  note.kind = Note::Kind::credit;
  say(note, 4);
  expect_refusal("4 bytes follow a note");
}

}  // namespace
}  // namespace pipelive
