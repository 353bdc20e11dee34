// The notes of a p2p channel, and the frames under it (FrameLink).
#include <memory>

#include "feed_channel.hpp"
#include "pipelive/device/host_device.hpp"
#include "pipelive/transport/peer_channel.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::size_t kPiece = 4096;
constexpr std::uint32_t kPieces = 3;
constexpr std::size_t kMostCalls = 60;

Deadline now() {
  return Deadline::after(std::chrono::nanoseconds(0));
}

struct Memory {
  std::shared_ptr<HostDevice> device = std::make_shared<HostDevice>();
  std::shared_ptr<Staging> own = std::make_shared<Staging>(device, StagingShape{kPiece, kPieces});
  Staging theirs{device, StagingShape{kPiece, kPieces}};
  std::shared_ptr<const PeerStaging> peer =
      std::make_shared<PeerStaging>(device, theirs.export_memory(), theirs.shape());
};

PeerChannel::Options options(const Memory& memory, std::uint8_t choice) {
  PeerChannel::Options made;
  made.device = memory.device;
  if ((choice & 1) != 0) made.own = memory.own;
  if ((choice & 2) != 0) made.peer = memory.peer;
  made.window_bytes = 2048;
  return made;
}

void call(PeerChannel& channel, FeedChannel& feed, Input& input) {
  const auto what = input.take<std::uint8_t>();
  switch (what % 8) {
    case 4: {
      const auto message = channel.try_receive(now());
      if (!message) return;
      require(!message->empty() && message->size() <= channel.max_message_bytes(),
              "a message is inside the window");
      const Bulk bulk = channel.received_bulk();
      require(bulk.bytes <= kPiece, "what comes beside it is inside a piece");
      std::byte sum{};
      for (std::size_t i = 0; i < bulk.bytes; ++i) sum ^= bulk.data[i];
      static_cast<void>(*const_cast<volatile std::byte*>(&sum));
      channel.release();
      return;
    }
    case 5:
    case 6: {
      const std::size_t bytes = 1 + input.take<std::uint8_t>();
      static_cast<void>(channel.acquire(bytes, now()));
      std::size_t beside = 0;
      try {
        if (what % 8 == 6) {
          beside = 1 + input.take<std::uint16_t>() % kPiece;
          const Bulk bulk = channel.acquire_bulk(beside, now());
          std::fill_n(bulk.data, beside, std::byte{1});
        }
      } catch (const Error&) {
        channel.submit(0, now());
        throw;
      }
      channel.submit((what & 0x80) != 0 ? 0 : bytes, now(), (what & 0x80) != 0 ? 0 : beside);
      return;
    }
    default:
      static_cast<void>(feed.feed(next_frame(input)));
  }
}

}  // namespace
}  // namespace pipelive::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace pipelive;
  using namespace pipelive::fuzz;
  static const Memory memory;
  Input input(data, size);
  const auto choice = input.take<std::uint8_t>();
  auto feed = std::make_shared<FeedChannel>();
  PeerChannel channel(feed, options(memory, choice));
  for (std::size_t calls = 0; !input.empty() && calls < kMostCalls; ++calls) {
    try {
      call(channel, *feed, input);
    } catch (const Error& error) {
      require(error.code() == ErrorCode::protocol || error.code() == ErrorCode::timeout ||
                  error.code() == ErrorCode::closed || error.code() == ErrorCode::invalid_argument,
              "what a peer says wrongly is a protocol error");
    }
  }
  return 0;
}
