// A source whose target answers anything: acknowledgements, digests, an abort, none of these.
#include <memory>

#include "layers.hpp"
#include "pipelive/migration/patch_sender.hpp"
#include "script_channel.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::uint64_t kEpoch = 7;
constexpr std::size_t kMostCalls = 40;

Deadline now() {
  return Deadline::after(std::chrono::nanoseconds(0));
}

struct Source {
  explicit Source(std::uint8_t choice)
      : layers((choice & 1) != 0 ? BlockOrder::nhd : BlockOrder::hnd),
        channel(std::make_shared<ScriptChannel>(
            ScriptChannel::Options{(choice & 2) != 0, (choice & 4) != 0, false})),
        sender(channel, layers.patch_layers(), options(choice)) {}

  static PatchSender::Options options(std::uint8_t choice) {
    PatchSender::Options made;
    made.epoch = kEpoch;
    made.checksum = (choice & 8) != 0;
    made.max_message_bytes = (choice & 16) != 0 ? 1024 : 0;
    return made;
  }

  Layers layers;
  std::shared_ptr<ScriptChannel> channel;
  PatchSender sender;
  std::int64_t through = -1;
};

void call(Source& source, Input& input) {
  const auto what = input.take<std::uint8_t>();
  PatchSender& sender = source.sender;
  const SlotRange ranges[] = {{input.take<std::uint8_t>() % Layers::kSlots, 1},
                              {Layers::kSlots - 6, 6}};
  switch (what % 8) {
    case 0:
    case 1:
      source.channel->script.push_back(next_message(input, source.layers.slot_bytes()));
      return;
    case 2:
    case 3: {
      const std::int64_t next = source.through + input.take<std::uint8_t>() % 4;
      static_cast<void>(sender.send_round(0, next, ranges, {}, now()));
      source.through = next;
      return;
    }
    case 4:
      static_cast<void>(sender.verify(ranges, now()));
      return;
    case 5: {
      const std::vector<std::byte> region(input.take<std::uint8_t>(), std::byte{3});
      sender.send_region(9, region, now());
      return;
    }
    case 6:
      sender.wait_applied(input.take<std::int8_t>(), now());
      return;
    default:
      sender.finish(now());
  }
}

void session(Input& input) {
  Source source(input.take<std::uint8_t>());
  for (std::size_t calls = 0; !input.empty() && calls < kMostCalls; ++calls) {
    try {
      call(source, input);
      require(source.sender.applied_through() <= source.through,
              "no more counts as applied than was sent");
    } catch (const Error&) {
      // Whatever the target says is an error of ours, and the session may go on being asked.
    }
  }
  const std::vector<bool> none[2] = {std::vector<bool>(Layers::kSlots),
                                     std::vector<bool>(Layers::kSlots)};
  source.layers.require_untouched_but(none);
}

}  // namespace
}  // namespace pipelive::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  pipelive::fuzz::Input input(data, size);
  pipelive::fuzz::session(input);
  return 0;
}
