// The framing of a stream: what comes in pieces is delivered as the frames say, or refused.
#include <sys/socket.h>

#include <deque>
#include <vector>

#include "fuzz_tools.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/transport/tcp_channel.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::size_t kMost = 3000;

// What a stream says, told by the definition of the format.
class Expected {
 public:
  void add(std::span<const std::byte> bytes) {
    rest_.insert(rest_.end(), bytes.begin(), bytes.end());
  }

  enum class Next { message, nothing, refusal };
  Next next(std::vector<std::byte>& message) {
    if (rest_.size() < 8) return Next::nothing;
    std::uint32_t words[2];
    std::memcpy(words, rest_.data(), sizeof words);
    if (words[1] != ~words[0] || words[0] == 0 || words[0] > kMost) return Next::refusal;
    if (rest_.size() < 8 + std::size_t{words[0]}) return Next::nothing;
    const auto begin = rest_.begin() + 8;
    message.assign(begin, begin + words[0]);
    rest_.erase(rest_.begin(), begin + words[0]);
    return Next::message;
  }

 private:
  std::vector<std::byte> rest_;
};

// Takes all that has come; false once the channel has ended.
bool drain(TcpChannel& channel, Expected& expected, bool closed) {
  std::vector<std::byte> message;
  while (true) {
    const Expected::Next next = expected.next(message);
    try {
      const auto got = channel.try_receive(Deadline::after(std::chrono::nanoseconds(0)));
      if (!got) {
        require(next == Expected::Next::nothing && !closed, "what is complete is delivered");
        return true;
      }
      require(next == Expected::Next::message && std::ranges::equal(*got, message),
              "a message is delivered as it was sent");
      channel.release();
    } catch (const Error& error) {
      require(next == Expected::Next::refusal ? error.code() == ErrorCode::protocol
                                              : closed && error.code() == ErrorCode::closed,
              "the end of a stream is closed, a bad length a protocol error");
      return false;
    }
  }
}

}  // namespace
}  // namespace pipelive::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace pipelive;
  using namespace pipelive::fuzz;
  int fds[2];
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
  UniqueFd peer(fds[0]);
  TcpOptions options;
  options.max_message_bytes = kMost;
  TcpChannel channel(UniqueFd(fds[1]), options);
  Expected expected;
  Input input(data, size);
  while (!input.empty()) {
    const std::span<const std::byte> piece = input.bytes(1 + input.take<std::uint8_t>());
    if (piece.empty()) break;
    require(send(peer.get(), piece.data(), piece.size(), MSG_NOSIGNAL) ==
                static_cast<ssize_t>(piece.size()),
            "send");
    expected.add(piece);
    if (!drain(channel, expected, false)) return 0;
  }
  peer.reset();
  require(!drain(channel, expected, true), "a peer that has gone is noticed");
  return 0;
}
