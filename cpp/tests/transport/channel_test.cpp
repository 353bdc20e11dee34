#include "pipelive/transport/channel.hpp"

#include <gtest/gtest.h>

#include <future>
#include <random>
#include <thread>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"
#include "transport/channel_pair.hpp"

namespace pipelive {
namespace {

using test::ChannelKind;
using test::ChannelPair;
using test::make_channels;
using test::shortly;
using test::soon;

template <typename Work>
ErrorCode code_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.code();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorCode::device;
}

std::vector<std::byte> message_of(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

std::vector<std::byte> take(Channel& channel) {
  const std::span<const std::byte> bytes = channel.receive(soon());
  std::vector<std::byte> copy(bytes.begin(), bytes.end());
  channel.release();
  return copy;
}

// What every channel promises, whatever carries it.
class ChannelContract : public ::testing::TestWithParam<ChannelKind> {};

INSTANTIATE_TEST_SUITE_P(Kinds, ChannelContract, PIPELIVE_CHANNEL_KINDS,
                         [](const auto& kind) { return test::name_of(kind.param); });

TEST_P(ChannelContract, CarriesMessagesBothWaysInOrder) {
  const auto [a, b] = make_channels(GetParam());
  for (const auto& [from, to] : {std::pair(a, b), std::pair(b, a)}) {
    for (std::uint64_t i = 0; i < 5; ++i) send(*from, message_of(1 + 100 * i, i), soon());
    for (std::uint64_t i = 0; i < 5; ++i) EXPECT_EQ(take(*to), message_of(1 + 100 * i, i));
  }
  EXPECT_EQ(a->stats().messages_sent, 5U);
  EXPECT_EQ(b->stats().bytes_received, a->stats().bytes_sent);
}

TEST_P(ChannelContract, LentBuffersAreAlignedAndMayBeGivenBack) {
  const auto [a, b] = make_channels(GetParam());
  for (const std::size_t size : {1, 63, 64, 65, 1000}) {
    const std::span<std::byte> buffer = a->acquire(size, soon());
    EXPECT_EQ(buffer.size(), size);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0U);
    a->submit(0, soon());
  }
  const std::span<std::byte> buffer = a->acquire(1000, soon());
  const std::vector<std::byte> part = message_of(10, 1);
  std::copy(part.begin(), part.end(), buffer.begin());
  a->submit(10, soon());
  EXPECT_EQ(take(*b), part);
}

TEST_P(ChannelContract, WrapsAroundManyTimesUnderBackPressure) {
  // A ring of four pages; messages of all sizes up to nearly all of it.
  const auto [a, b] = make_channels(GetParam(), 16384);
  constexpr int kMessages = 3000;
  const std::size_t largest = 12000;
  std::thread sender([&a = a] {
    std::mt19937_64 sizes(42);
    for (std::uint64_t i = 0; i < kMessages; ++i) {
      send(*a, message_of(1 + sizes() % largest, i), soon());
    }
  });
  std::mt19937_64 sizes(42);
  for (std::uint64_t i = 0; i < kMessages; ++i) {
    ASSERT_EQ(take(*b), message_of(1 + sizes() % largest, i)) << i;
  }
  sender.join();
}

TEST_P(ChannelContract, BothDirectionsAtOnceWithFullQueues) {
  const auto [a, b] = make_channels(GetParam(), 65536);
  const auto traffic = [](Channel& channel, std::uint64_t own, std::uint64_t theirs) {
    std::thread reader([&channel, theirs] {
      for (std::uint64_t i = 0; i < 400; ++i)
        ASSERT_EQ(take(channel), message_of(20000, theirs + i));
    });
    for (std::uint64_t i = 0; i < 400; ++i) send(channel, message_of(20000, own + i), soon());
    reader.join();
  };
  std::thread other([&b = b, &traffic] { traffic(*b, 5000, 1000); });
  traffic(*a, 1000, 5000);
  other.join();
}

TEST_P(ChannelContract, TooLargeOrOutOfOrderIsRefused) {
  const auto [a, b] = make_channels(GetParam());
  const auto refused = [](const auto& work) {
    return code_of(work) == ErrorCode::invalid_argument;
  };
  EXPECT_TRUE(refused([&] { static_cast<void>(a->acquire(a->max_message_bytes() + 1, soon())); }));
  EXPECT_TRUE(refused([&] { static_cast<void>(a->acquire(0, soon())); }));
  EXPECT_TRUE(refused([&] { a->submit(1, soon()); }));
  EXPECT_TRUE(refused([&] { a->release(); }));
  static_cast<void>(a->acquire(100, soon()));
  EXPECT_TRUE(refused([&] { static_cast<void>(a->acquire(100, soon())); }));
  EXPECT_TRUE(refused([&] { a->submit(101, soon()); }));
  a->submit(100, soon());
  static_cast<void>(b->receive(soon()));
  EXPECT_TRUE(refused([&] { static_cast<void>(b->receive(soon())); }));
  b->release();
}

TEST_P(ChannelContract, TheLargestMessageGoesThrough) {
  TcpOptions options;
  options.max_message_bytes = 300000;
  const auto [a, b] = make_channels(GetParam(), 300032, options);
  const std::vector<std::byte> message = message_of(a->max_message_bytes(), 9);
  std::thread sender([&a = a, &message] {
    for (int i = 0; i < 3; ++i) send(*a, message, soon());
  });
  for (int i = 0; i < 3; ++i) EXPECT_EQ(take(*b), message);
  sender.join();
}

TEST_P(ChannelContract, DeadlinesHoldAndTheChannelLivesOn) {
  const auto [a, b] = make_channels(GetParam(), 65536);
  EXPECT_FALSE(b->try_receive(Deadline::after(std::chrono::nanoseconds(0))));
  EXPECT_EQ(code_of([&] { static_cast<void>(b->receive(shortly())); }), ErrorCode::timeout);
  send(*a, message_of(10, 1), soon());
  EXPECT_EQ(take(*b), message_of(10, 1));
}

TEST_P(ChannelContract, SendingToAPeerThatDoesNotReadTimesOut) {
  const auto [a, b] = make_channels(GetParam(), 65536);
  const ErrorCode code = code_of([&a = a] {
    for (int i = 0; i < 10000; ++i) send(*a, message_of(50000, 1), shortly());
  });
  EXPECT_EQ(code, ErrorCode::timeout);
}

TEST_P(ChannelContract, WhatWasSentBeforeACloseIsStillReceived) {
  const auto [a, b] = make_channels(GetParam());
  send(*a, message_of(1000, 1), soon());
  send(*a, message_of(2000, 2), soon());
  a->close();
  EXPECT_EQ(code_of([&] { static_cast<void>(a->acquire(1, soon())); }), ErrorCode::closed);
  EXPECT_EQ(code_of([&] { static_cast<void>(a->receive(soon())); }), ErrorCode::closed);
  EXPECT_EQ(take(*b), message_of(1000, 1));
  EXPECT_EQ(take(*b), message_of(2000, 2));
  EXPECT_EQ(code_of([&] { static_cast<void>(b->receive(soon())); }), ErrorCode::closed);
  // A sender learns of it at the latest when there is no more room.
  EXPECT_EQ(code_of([&b = b] {
              for (int i = 0; i < 10000; ++i) send(*b, message_of(50000, 1), soon());
            }),
            ErrorCode::closed);
}

TEST_P(ChannelContract, APeerThatDiesIsNoticedByAWaitingReceiver) {
  auto [a, b] = make_channels(GetParam());
  auto waiting = std::async(std::launch::async, [&b = b] {
    return code_of([&] { static_cast<void>(b->receive(soon())); });
  });
  a.reset();
  EXPECT_EQ(waiting.get(), ErrorCode::closed);
}

TEST_P(ChannelContract, APeerThatDiesIsNoticedByAWaitingSender) {
  auto [a, b] = make_channels(GetParam(), 65536);
  auto waiting = std::async(std::launch::async, [&b = b] {
    return code_of([&] {
      for (int i = 0; i < 10000; ++i) send(*b, message_of(50000, 1), soon());
    });
  });
  a.reset();
  EXPECT_EQ(waiting.get(), ErrorCode::closed);
}

TEST_P(ChannelContract, CancelWakesAReceiverAndTellsThePeer) {
  const auto [a, b] = make_channels(GetParam());
  auto waiting = std::async(std::launch::async, [&a = a] {
    return code_of([&] { static_cast<void>(a->receive(soon())); });
  });
  a->cancel();
  EXPECT_EQ(waiting.get(), ErrorCode::cancelled);
  EXPECT_EQ(code_of([&] { static_cast<void>(b->receive(soon())); }), ErrorCode::closed);
  a->cancel();
  a->close();
  EXPECT_EQ(code_of([&] { static_cast<void>(a->receive(soon())); }), ErrorCode::cancelled);
}

TEST_P(ChannelContract, CancelWakesASender) {
  const auto [a, b] = make_channels(GetParam(), 65536);
  auto waiting = std::async(std::launch::async, [&a = a] {
    return code_of([&] {
      for (int i = 0; i < 10000; ++i) send(*a, message_of(50000, 1), soon());
    });
  });
  // Cancelled while it waits for room, or just before it does; either way it ends.
  while (a->stats().messages_sent == 0) std::this_thread::yield();
  a->cancel();
  EXPECT_EQ(waiting.get(), ErrorCode::cancelled);
}

TEST_P(ChannelContract, ALentBufferStaysMappedAfterACancel) {
  const auto [a, b] = make_channels(GetParam());
  const std::span<std::byte> buffer = a->acquire(5000, soon());
  a->cancel();
  std::fill(buffer.begin(), buffer.end(), std::byte{1});
  EXPECT_EQ(code_of([&] { a->submit(5000, soon()); }), ErrorCode::cancelled);
}

TEST_P(ChannelContract, CancelRacingWithTraffic) {
  for (int trial = 0; trial < 30; ++trial) {
    const auto [a, b] = make_channels(GetParam(), 65536);
    std::thread sender([&a = a] {
      try {
        while (true) send(*a, message_of(7000, 3), soon());
      } catch (const Error& error) {
        EXPECT_TRUE(error.code() == ErrorCode::cancelled || error.code() == ErrorCode::closed);
      }
    });
    const std::vector<std::byte> expected = message_of(7000, 3);
    std::thread receiver([&b = b, &expected] {
      try {
        while (true) ASSERT_EQ(take(*b), expected);
      } catch (const Error& error) {
        EXPECT_TRUE(error.code() == ErrorCode::cancelled || error.code() == ErrorCode::closed);
      }
    });
    for (int i = 0; i < trial; ++i) std::this_thread::yield();
    (trial % 2 == 0 ? a : b)->cancel();
    sender.join();
    receiver.join();
  }
}

}  // namespace
}  // namespace pipelive
