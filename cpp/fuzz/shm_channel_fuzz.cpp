// A peer that writes what it likes into the memory of both rings, between any two calls.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "fuzz_tools.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/transport/shm_channel.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::size_t kRing = 4096;
constexpr std::size_t kControl = 4096;
constexpr std::size_t kBytes = kControl + 2 * kRing;
constexpr std::size_t kMostCalls = 200;

Deadline now() {
  return Deadline::after(std::chrono::nanoseconds(0));
}

/// The whole memory, as the peer has it mapped.
class PeerMemory {
 public:
  explicit PeerMemory(int fd)
      : base_(static_cast<std::byte*>(
            mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0))) {
    require(base_ != MAP_FAILED, "mmap");
  }
  ~PeerMemory() { munmap(base_, kBytes); }
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  template <typename T>
  void write(std::size_t at, T value) {
    std::memcpy(base_ + at % (kBytes - sizeof value), &value, sizeof value);
  }

 private:
  std::byte* base_;
};

void read_all(ShmChannel& channel) {
  const auto message = channel.try_receive(now());
  if (!message) return;
  require(!message->empty() && message->size() <= channel.max_message_bytes(),
          "a message is not larger than the ring");
  std::byte sum{};
  for (const std::byte b : *message) sum ^= b;
  static_cast<void>(*const_cast<volatile std::byte*>(&sum));
  channel.release();
}

void write_some(ShmChannel& channel, std::size_t bytes) {
  const std::span<std::byte> buffer = channel.acquire(bytes, now());
  require(buffer.size() == bytes, "the buffer has the size that was asked for");
  std::fill(buffer.begin(), buffer.end(), std::byte{1});
  channel.submit(bytes, now());
}

void step(ShmChannel& channel, PeerMemory& memory, Input& input) {
  const auto what = input.take<std::uint8_t>();
  const std::size_t word = what / 8 * 8;  // control words lie in the first 256 bytes or so
  switch (what % 8) {
    case 0:  // counters look like small multiples of 64
      memory.write(word, std::uint64_t{input.take<std::uint8_t>()} * 64);
      return;
    case 1:
      memory.write(word + 128, std::uint64_t{input.take<std::uint8_t>()} * 64);
      return;
    case 2:
      memory.write(input.take<std::uint16_t>() % 512U, input.take<std::uint64_t>());
      return;
    case 3: {  // a frame where the next one is read, or anywhere else
      const std::size_t at = kControl + std::size_t{input.take<std::uint8_t>()} * 64;
      const std::uint64_t bytes = input.take<std::uint16_t>();
      memory.write(at, bytes);
      memory.write(at + 8, ~bytes);
      return;
    }
    case 4:
      memory.write(input.take<std::uint16_t>(), input.take<std::uint64_t>());
      return;
    case 5:
    case 6:
      read_all(channel);
      return;
    default:
      write_some(channel, 1 + input.take<std::uint16_t>() % channel.max_message_bytes());
  }
}

}  // namespace
}  // namespace pipelive::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace pipelive;
  using namespace pipelive::fuzz;
  Input input(data, size);
  int fds[2];
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
  const UniqueFd peer(fds[0]);
  UniqueFd file = ShmChannel::create_memory(kRing);
  PeerMemory memory(file.get());
  ShmChannel channel(UniqueFd(fds[1]), std::move(file), input.take<std::uint8_t>() & 1);
  for (std::size_t calls = 0; !input.empty() && calls < kMostCalls; ++calls) {
    try {
      step(channel, memory, input);
    } catch (const Error& error) {
      require(error.code() == ErrorCode::protocol || error.code() == ErrorCode::timeout ||
                  error.code() == ErrorCode::closed,
              "a ring that makes no sense is a protocol error, a full one a timeout");
    }
  }
  return 0;
}
