// A whole target: what arrives is a source's session in which any byte may be wrong.
#include <memory>
#include <optional>

#include "layers.hpp"
#include "pipelive/migration/patch_receiver.hpp"
#include "script_channel.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::uint64_t kEpoch = 7;
constexpr std::uint64_t kRegion = 9;
constexpr std::size_t kRegionBytes = 200;
constexpr std::size_t kMostMessages = 64;

struct Region {
  // With room behind: writes that a sanitizer would take for the region's are seen as well.
  std::vector<std::byte> bytes = std::vector<std::byte>(kRegionBytes + 64, std::byte{0xEE});
  [[nodiscard]] std::span<std::byte> served() { return std::span(bytes).first(kRegionBytes); }
};

void allow(const ScriptMessage& message, std::vector<bool> (&may)[2], bool& region) {
  const auto kind = static_cast<wire::Kind>(field<std::uint8_t>(message.bytes, 6));
  if (field<std::uint64_t>(message.bytes, 8) != kEpoch) return;
  if (kind == wire::Kind::region) region = true;
  if (kind != wire::Kind::data) return;
  for (const wire::Record& record : records_of(message.bytes)) {
    for (std::size_t place = 0; place < 2; ++place) {
      if (record.layer != Layers::kIds[place] || record.begin >= Layers::kSlots) continue;
      const std::uint64_t end =
          record.begin + std::min<std::uint64_t>(record.count, Layers::kSlots);
      for (std::uint64_t slot = record.begin; slot < std::min(end, Layers::kSlots); ++slot) {
        may[place][slot] = true;
      }
    }
  }
}

std::optional<ErrorCode> run(PatchReceiver& receiver) {
  try {
    receiver.run(Deadline::after(std::chrono::nanoseconds(0)));
  } catch (const Error& error) {
    return error.code();
  }
  return std::nullopt;
}

void session(Input& input) {
  const auto options = input.take<std::uint8_t>();
  const auto capacity = input.take<std::uint8_t>();
  const auto resize_seq = input.take<std::int8_t>();
  Layers layers((options & 1) != 0 ? BlockOrder::nhd : BlockOrder::hnd);
  Region region;
  auto channel = std::make_shared<ScriptChannel>(
      ScriptChannel::Options{(options & 2) != 0, (options & 4) != 0});
  std::vector<bool> may[2] = {std::vector<bool>(Layers::kSlots), std::vector<bool>(Layers::kSlots)};
  bool region_named = false;
  while (!input.empty() && channel->script.size() < kMostMessages) {
    ScriptMessage message = next_message(input, layers.slot_bytes());
    allow(message, may, region_named);
    channel->script.push_back(std::move(message));
  }
  PatchReceiver::Options wanted;
  wanted.epoch = kEpoch;
  if ((options & 8) != 0) wanted.checksum = (options & 16) != 0;
  PatchReceiver receiver(channel, layers.patch_layers(), wanted,
                         {{kRegion, region.served(), nullptr}});
  std::uint64_t blocks = Layers::kBlocks;
  if ((options & 32) != 0) {
    blocks = capacity % (Layers::kBlocks + 1);
    receiver.set_capacity(blocks, resize_seq);
  }
  const std::optional<ErrorCode> failure = run(receiver);
  require(failure.has_value() || channel->script.empty() || !channel->sent.empty(),
          "a session ends well only after a finish that was answered");

  for (std::vector<bool>& layer : may) {
    for (std::uint64_t slot = blocks * Layers::kBlockSize; slot < Layers::kSlots; ++slot) {
      layer[slot] = false;
    }
  }
  layers.require_untouched_but(may);
  for (std::size_t at = region_named ? kRegionBytes : 0; at < region.bytes.size(); ++at) {
    require(region.bytes[at] == std::byte{0xEE}, "nothing outside a named region is written");
  }
  wire::Message answer;
  for (const std::vector<std::byte>& sent : channel->sent) {
    wire::open_message(sent, nullptr, answer);
    require(answer.header.epoch == kEpoch, "answers are of the session's epoch");
  }
  require(receiver.applied_through() >= -1, "nothing is applied before the first step");
}

}  // namespace
}  // namespace pipelive::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  pipelive::fuzz::Input input(data, size);
  pipelive::fuzz::session(input);
  return 0;
}
