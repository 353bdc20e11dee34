// Peers that break the rules of a channel: what they send may be refused, never believed.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <future>
#include <random>
#include <thread>

#include "pipelive/base/error.hpp"
#include "transport/channel_pair.hpp"

namespace pipelive {
namespace {

using test::SocketPair;
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

void write_all(int fd, const void* data, std::size_t size) {
  test::require(::send(fd, data, size, MSG_NOSIGNAL) == static_cast<ssize_t>(size), "send");
}

std::uint64_t head_of(std::uint32_t size) {
  return (static_cast<std::uint64_t>(~size) << 32) | size;
}

class RawTcp : public ::testing::Test {
 protected:
  explicit RawTcp(TcpOptions options = {}) {
    SocketPair sockets = test::tcp_pair();
    raw = std::move(sockets.a);
    channel = std::make_unique<TcpChannel>(std::move(sockets.b), options);
  }
  UniqueFd raw;
  std::unique_ptr<TcpChannel> channel;
};

TEST_F(RawTcp, LengthsThatCannotBeAreRefused) {
  for (const std::uint64_t head :
       {std::uint64_t{0}, ~std::uint64_t{0}, head_of(0), head_of(0x80000000U),
        head_of((64U << 20) + 1), head_of(100) ^ (std::uint64_t{1} << 40)}) {
    SocketPair sockets = test::tcp_pair();
    TcpChannel fresh(std::move(sockets.b));
    write_all(sockets.a.get(), &head, sizeof head);
    EXPECT_EQ(code_of([&] { static_cast<void>(fresh.receive(soon())); }), ErrorCode::protocol)
        << std::hex << head;
  }
}

TEST_F(RawTcp, TruncatedMessagesAreNotDelivered) {
  const std::uint64_t head = head_of(1000);
  const std::vector<std::byte> part(400);
  write_all(raw.get(), &head, sizeof head);
  write_all(raw.get(), part.data(), part.size());
  shutdown(raw.get(), SHUT_WR);  // half-closed
  EXPECT_EQ(code_of([&] { static_cast<void>(channel->receive(soon())); }), ErrorCode::closed);
}

TEST_F(RawTcp, TruncatedLengthsAreNotDelivered) {
  const std::uint64_t head = head_of(1000);
  write_all(raw.get(), &head, 5);
  raw.reset();
  EXPECT_EQ(code_of([&] { static_cast<void>(channel->receive(soon())); }), ErrorCode::closed);
}

TEST_F(RawTcp, AMessageCutByADeadlineIsContinued) {
  const std::uint64_t head = head_of(6);
  write_all(raw.get(), &head, 3);
  EXPECT_FALSE(channel->try_receive(test::shortly()));
  write_all(raw.get(), reinterpret_cast<const char*>(&head) + 3, 5);
  write_all(raw.get(), "abc", 3);
  EXPECT_FALSE(channel->try_receive(test::shortly()));
  write_all(raw.get(), "def", 3);
  const auto message = channel->receive(soon());
  EXPECT_EQ(std::memcmp(message.data(), "abcdef", 6), 0);
}

TcpOptions impatient() {
  TcpOptions options;
  options.progress_window = std::chrono::milliseconds(50);
  options.progress_bytes = 1000;
  return options;
}

class ImpatientTcp : public RawTcp {
 protected:
  ImpatientTcp() : RawTcp(impatient()) {}
};

TEST_F(ImpatientTcp, ADripIsCutOffLongBeforeTheDeadline) {
  const std::uint64_t head = head_of(100000);
  write_all(raw.get(), &head, sizeof head);
  std::atomic<bool> stop{false};
  std::thread drip([&] {
    while (!stop.load()) {
      const char byte = 0;
      static_cast<void>(!::send(raw.get(), &byte, 1, MSG_NOSIGNAL));
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  });
  const ErrorCode code =
      code_of([&] { static_cast<void>(channel->receive(Deadline::after(std::chrono::hours(1)))); });
  stop = true;
  drip.join();
  EXPECT_EQ(code, ErrorCode::timeout);
}

TEST_F(ImpatientTcp, APeerThatStopsReadingIsCutOff) {
  const ErrorCode code = code_of([&] {
    const std::vector<std::byte> message(std::size_t{32} << 20);
    send(*channel, message, Deadline::after(std::chrono::hours(1)));
  });
  EXPECT_EQ(code, ErrorCode::timeout);
  EXPECT_EQ(code_of([&] { static_cast<void>(channel->acquire(1, soon())); }), ErrorCode::closed);
}

TEST(HostileTcp, RandomBytesNeverCrash) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    SocketPair sockets = test::tcp_pair();
    TcpChannel channel(std::move(sockets.b));
    std::vector<std::byte> bytes(1 + random() % 300);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    if (random() % 2 == 0) {  // sometimes a valid length, so that the body is garbage
      const std::uint64_t head = head_of(static_cast<std::uint32_t>(1 + random() % 200));
      write_all(sockets.a.get(), &head, sizeof head);
    }
    write_all(sockets.a.get(), bytes.data(), bytes.size());
    sockets.a.reset();
    try {
      while (true) {
        static_cast<void>(channel.receive(soon()));
        channel.release();
      }
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == ErrorCode::closed || error.code() == ErrorCode::protocol);
    }
  }
}

// The other end of a shared-memory channel, as raw memory.
class RawShm : public ::testing::Test {
 protected:
  static constexpr std::size_t kRing = 65536;
  static constexpr std::size_t kBytes = 4096 + 2 * kRing;

  RawShm() {
    SocketPair sockets = test::unix_pair();
    raw_socket = std::move(sockets.b);
    UniqueFd memory = ShmChannel::create_memory(kRing);
    void* const mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
    test::require(mapped != MAP_FAILED, "mmap");
    raw = static_cast<std::byte*>(mapped);
    channel = std::make_unique<ShmChannel>(std::move(sockets.a), std::move(memory), 0);
  }
  ~RawShm() override { munmap(raw, kBytes); }

  UniqueFd raw_socket;
  std::byte* raw = nullptr;
  std::unique_ptr<ShmChannel> channel;
};

TEST_F(RawShm, RandomControlWordsNeverCrash) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    SocketPair sockets = test::unix_pair();
    UniqueFd memory = ShmChannel::create_memory(kRing);
    void* const mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
    test::require(mapped != MAP_FAILED, "mmap");
    ShmChannel victim(std::move(sockets.a), std::move(memory), 0);
    auto* const words = static_cast<std::uint64_t*>(mapped);
    // Small values are the dangerous ones: they look like counters.
    const auto word = [&]() -> std::uint64_t {
      switch (random() % 4) {
        case 0:
          return random() % 8 * 64;
        case 1:
          return random() % (2 * kRing);
        case 2:
          return ~std::uint64_t{0} - random() % 128;
        default:
          return random();
      }
    };
    for (std::size_t i = 8; i < 128; ++i) {  // past the states, over both rings' control
      if (random() % 4 == 0) words[i] = word();
    }
    for (std::size_t i = 512; i < kBytes / 8; i += 1 + random() % 64) words[i] = word();
    try {
      for (int i = 0; i < 20; ++i) {
        if (const auto message = victim.try_receive(Deadline::after(std::chrono::nanoseconds(0)))) {
          // Every byte that it hands out can be read.
          volatile std::byte sum{};
          for (const std::byte b : *message) sum = sum ^ b;
          victim.release();
        }
        const auto buffer =
            victim.acquire(1 + random() % 5000, Deadline::after(std::chrono::nanoseconds(0)));
        std::fill(buffer.begin(), buffer.end(), std::byte{1});
        victim.submit(buffer.size(), soon());
      }
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == ErrorCode::protocol || error.code() == ErrorCode::timeout ||
                  error.code() == ErrorCode::closed)
          << error.what();
    }
    munmap(mapped, kBytes);
  }
}

TEST_F(RawShm, BytesOnTheSocketAreRefused) {
  write_all(raw_socket.get(), "x", 1);
  EXPECT_EQ(code_of([&] { static_cast<void>(channel->receive(soon())); }), ErrorCode::protocol);
}

TEST_F(RawShm, ASocketThatIsShutEndsTheChannel) {
  shutdown(raw_socket.get(), SHUT_WR);
  EXPECT_EQ(code_of([&] { static_cast<void>(channel->receive(soon())); }), ErrorCode::closed);
}

TEST(HostileShm, MemoryThatCouldBeCutShortIsRefused) {
  const auto attach = [](UniqueFd memory) {
    SocketPair sockets = test::unix_pair();
    return code_of([&] { ShmChannel channel(std::move(sockets.a), std::move(memory), 1); });
  };
  UniqueFd unsealed(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  test::require(ftruncate(unsealed.get(), 4096 * 3) == 0, "ftruncate");
  EXPECT_EQ(attach(std::move(unsealed)), ErrorCode::protocol);

  for (const off_t size : {0, 4096, 8192, 4096 * 4, 5000}) {
    UniqueFd sealed(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    test::require(ftruncate(sealed.get(), size) == 0, "ftruncate");
    fcntl(sealed.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    EXPECT_EQ(attach(std::move(sealed)), ErrorCode::protocol) << size;
  }
  SocketPair no_memory = test::unix_pair();
  EXPECT_EQ(attach(std::move(no_memory.a)), ErrorCode::protocol);
}

}  // namespace
}  // namespace pipelive
