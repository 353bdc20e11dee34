// The notes by which two ends of a NCCL channel agree on a transfer.
#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <thread>

#include "feed_channel.hpp"
#include "pipelive/cuda/nccl_channel.hpp"
#include "pipelive/device/host_device.hpp"

namespace pipelive::cuda {
namespace {

using fuzz::FeedChannel;
using fuzz::Input;
using fuzz::require;

constexpr std::size_t kPiece = PIPELIVE_FUZZ_PIECE;
constexpr std::size_t kMostCalls = 20;
constexpr std::size_t kMostAnswers = 3;
// Of a call, and of the peer who waits for this end to speak before it goes on.
constexpr std::chrono::milliseconds kCall{8};
constexpr std::chrono::milliseconds kPatience{2};

struct Place {
  std::shared_ptr<DeviceTurn> turn = std::make_shared<DeviceTurn>();
  NcclComm::Place nccl;

  Place() {
    const std::string candidates[] = {PIPELIVE_INSTANT_NCCL};
    nccl.nccl = Nccl::open(candidates);
    nccl.issuer = std::make_shared<NcclIssuer>(nullptr);
    nccl.device = std::make_shared<HostDevice>();
  }
  [[nodiscard]] NcclChannel::Options options() const {
    NcclChannel::Options made;
    made.comm = std::make_shared<NcclComm>(nccl, nccl.nccl->unique_id(), 0, 2,
                                           Deadline::after(std::chrono::seconds(20)));
    made.turn = turn;
    made.out = std::make_shared<Staging>(nccl.device, StagingShape{kPiece, 1});
    made.in = std::make_shared<Staging>(nccl.device, StagingShape{kPiece, 1});
    made.window_bytes = 2048;
    made.verdict_patience = kCall;
    return made;
  }
};

/// The peer while this end is in a call: once it has heard `from` frames, it says something after
/// each.
class Answering {
 public:
  Answering(FeedChannel& feed, Input& input, std::size_t answers, std::size_t from) : feed_(feed) {
    const std::uint64_t first = feed.sent() + from;
    for (std::size_t i = 0; i < answers; ++i) frames_.push_back(fuzz::next_frame(input));
    thread_ = std::thread([this, first] {
      for (std::size_t i = 0; i < frames_.size(); ++i) {
        feed_.await_sent(first + i, kPatience);
        if (!feed_.feed(std::move(frames_[i]))) return;
      }
    });
  }
  ~Answering() { thread_.join(); }
  Answering(const Answering&) = delete;
  Answering& operator=(const Answering&) = delete;

 private:
  FeedChannel& feed_;
  std::vector<std::vector<std::byte>> frames_;
  std::thread thread_;
};

void receive(NcclChannel& channel) {
  const auto message = channel.try_receive(Deadline::after(kCall));
  if (!message) return;
  require(!message->empty() && message->size() <= channel.max_message_bytes(),
          "a message is inside the window");
  const Bulk bulk = channel.received_bulk();
  require(bulk.bytes <= kPiece, "what comes beside it is inside a piece");
  require(
      std::all_of(bulk.data, bulk.data + bulk.bytes, [](std::byte b) { return b == std::byte{}; }),
      "a payload is what was received");
  channel.release();
}

void submit(NcclChannel& channel, std::size_t beside) {
  const Deadline deadline = Deadline::after(kCall);
  static_cast<void>(channel.acquire(8, deadline));
  try {
    if (beside != 0) {
      const Bulk bulk = channel.acquire_bulk(beside, deadline);
      std::fill_n(bulk.data, beside, std::byte{1});
    }
  } catch (const Error&) {
    channel.submit(0, deadline);
    throw;
  }
  channel.submit(8, deadline, beside);
}

void call(NcclChannel& channel, FeedChannel& feed, Input& input) {
  const auto what = input.take<std::uint8_t>();
  const std::size_t answers = std::min<std::size_t>(what >> 6, kMostAnswers);
  switch (what % 4) {
    case 0: {
      const Answering peer(feed, input, answers, 1);  // after the accept
      receive(channel);
      return;
    }
    case 1: {
      const std::size_t beside = input.take<std::uint16_t>() % (kPiece + 1);
      const Answering peer(feed, input, answers, 2);  // after message and offer
      submit(channel, beside);
      return;
    }
    default:
      static_cast<void>(feed.feed(fuzz::next_frame(input)));
  }
}

}  // namespace
}  // namespace pipelive::cuda

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace pipelive;
  static const cuda::Place place;
  fuzz::Input input(data, size);
  auto feed = std::make_shared<fuzz::FeedChannel>();
  cuda::NcclChannel channel(feed, place.options());
  for (std::size_t calls = 0; !input.empty() && calls < cuda::kMostCalls; ++calls) {
    try {
      cuda::call(channel, *feed, input);
    } catch (const Error& error) {
      fuzz::require(error.code() == ErrorCode::protocol || error.code() == ErrorCode::timeout ||
                        error.code() == ErrorCode::closed,
                    "what a peer says wrongly is a protocol error");
    }
  }
  // Whatever the peer says, the device's turn is free again when nobody is in a call.
  fuzz::require(place.turn->holder().empty(), "the turn is given back");
  return 0;
}
