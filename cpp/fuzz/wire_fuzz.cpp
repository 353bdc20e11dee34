// Everything in wire.hpp that reads bytes from a peer.
#include <optional>

#include "pipelive/base/error.hpp"
#include "script.hpp"

namespace pipelive::fuzz {
namespace {

constexpr std::size_t kSlotBytes = 64;

std::optional<wire::Message> opened(const ScriptMessage& message, std::vector<std::byte>* copy) {
  wire::Message result;
  wire::Beside beside;
  beside.bytes = message.beside;
  beside.crc = [](std::span<const std::byte> bytes, std::uint32_t seed) {
    return crc32c(bytes, seed);
  };
  try {
    wire::open_message(message.bytes, copy, result, message.beside.empty() ? nullptr : &beside);
  } catch (const Error& error) {
    require(error.code() == ErrorCode::protocol || error.code() == ErrorCode::corrupt,
            "a message is opened, or it is a protocol or corrupt error");
    return std::nullopt;
  }
  return result;
}

template <typename Decode>
void decode(const Decode& work) {
  try {
    work();
  } catch (const Error& error) {
    require(error.code() == ErrorCode::protocol, "a payload is decoded, or it is a protocol error");
  }
}

void decode_all(std::span<const std::byte> payload) {
  decode([&] {
    const wire::Hello hello = wire::read_hello(payload);
    const std::uint32_t layers[] = {1, 2};
    const wire::Hello own =
        wire::make_hello({2, 8, DType::bfloat16, 4, BlockOrder::hnd}, true, layers);
    require(wire::describe_mismatch(hello, own).empty() == (hello == own),
            "a hello that differs is described");
    require(std::ranges::equal(wire::write_hello(hello), payload), "a hello is what was read");
  });
  decode([&] {
    const wire::RoundTotals totals = wire::read_round_totals(payload);
    const std::vector<std::uint32_t> layers = wire::read_round_layers(payload);
    require(std::ranges::equal(wire::write_round_end(totals, layers), payload),
            "a round's end is what was read");
  });
}

void check(const ScriptMessage& message) {
  const std::optional<wire::Message> direct = opened(message, nullptr);
  std::vector<std::byte> copy(3, std::byte{0x55});  // as left by a message before
  const std::optional<wire::Message> copied = opened(message, &copy);
  require(direct.has_value() == copied.has_value(), "a copy is judged as the original is");
  if (!direct) return;
  require(
      direct->records == copied->records && std::ranges::equal(direct->payload, copied->payload),
      "a copy says what the original says");
  std::vector<std::byte> again(message.bytes.size());
  wire::write_records(again, direct->records);
  wire::write_header(again, direct->header, field<std::uint32_t>(message.bytes, 64));
  const std::size_t table = wire::payload_offset(direct->records.size());
  const bool unused_crc = (direct->header.flags & wire::kBodyChecksum) == 0 &&
                          field<std::uint32_t>(message.bytes, 64) != 0;
  require(
      unused_crc || std::equal(again.begin(), again.begin() + static_cast<std::ptrdiff_t>(table),
                               message.bytes.begin()),
      "what was read writes the same bytes");
  decode_all(direct->payload);
}

}  // namespace
}  // namespace pipelive::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace pipelive::fuzz;
  Input input(data, size);
  while (!input.empty()) {
    const ScriptMessage message = next_message(input, kSlotBytes);
    check(message);
    decode_all(message.bytes);
  }
  return 0;
}
