#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "fuzz_tools.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/wire.hpp"

namespace pipelive::fuzz {

// A checksum keeps a fuzzer out of everything behind it, so what a peer would have got right is
// mended where the input asks for it, and the rest of the message is as hostile as it likes.
inline constexpr std::uint8_t kSign = 1;    ///< header and body CRC are right
inline constexpr std::uint8_t kFit = 2;     ///< records and payload fill the message
inline constexpr std::uint8_t kPad = 4;     ///< the payload is as long as the records say
inline constexpr std::uint8_t kBeside = 8;  ///< the payload goes beside the message

/// A message of a session, as it would arrive.
struct ScriptMessage {
  std::uint8_t how = 0;
  std::vector<std::byte> bytes;
  std::vector<std::byte> beside;
};

template <typename T>
T field(const std::vector<std::byte>& message, std::size_t at) {
  T value{};
  if (at + sizeof value <= message.size()) std::memcpy(&value, message.data() + at, sizeof value);
  return value;
}

template <typename T>
void set_field(std::vector<std::byte>& message, std::size_t at, T value) {
  if (at + sizeof value <= message.size()) std::memcpy(message.data() + at, &value, sizeof value);
}

inline std::vector<wire::Record> records_of(const std::vector<std::byte>& message) {
  const std::size_t room = message.size() < wire::kHeaderBytes
                               ? 0
                               : (message.size() - wire::kHeaderBytes) / wire::kRecordBytes;
  std::vector<wire::Record> records(std::min<std::size_t>(field<std::uint32_t>(message, 36), room));
  if (!records.empty()) {
    std::memcpy(records.data(), message.data() + wire::kHeaderBytes,
                records.size() * wire::kRecordBytes);
  }
  return records;
}

inline void mend(ScriptMessage& message, std::size_t slot_bytes) {
  std::vector<std::byte>& bytes = message.bytes;
  if ((message.how & (kSign | kFit)) != 0 && bytes.size() < wire::payload_offset(0)) {
    bytes.resize(wire::payload_offset(0));
  }
  std::size_t payload_at = bytes.size();
  if ((message.how & kFit) != 0) {
    std::size_t records = records_of(bytes).size();
    while (records != 0 && wire::payload_offset(records) > bytes.size()) --records;
    set_field(bytes, 36, static_cast<std::uint32_t>(records));
    payload_at = wire::payload_offset(records);
    const std::size_t end = wire::kHeaderBytes + records * wire::kRecordBytes;
    std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(end),
              bytes.begin() + static_cast<std::ptrdiff_t>(payload_at), std::byte{0});
    if ((message.how & kPad) != 0) {
      std::uint64_t slots = 0;
      for (const wire::Record& record : records_of(bytes)) {
        slots += std::min<std::uint64_t>(record.count, 512);
      }
      bytes.resize(
          payload_at + static_cast<std::size_t>(std::min<std::uint64_t>(slots, 512)) * slot_bytes,
          std::byte{0x77});
    }
    set_field(bytes, 40, std::uint64_t{bytes.size() - payload_at});
    const auto flags = field<std::uint8_t>(bytes, 7);
    const bool beside = (message.how & kBeside) != 0 && bytes.size() > payload_at;
    set_field(bytes, 7,
              static_cast<std::uint8_t>(beside ? flags | wire::kPayloadBeside
                                               : flags & ~wire::kPayloadBeside));
  }
  if ((message.how & kSign) != 0) {
    const bool checked = (field<std::uint8_t>(bytes, 7) & wire::kBodyChecksum) != 0;
    const std::span<const std::byte> all(bytes);
    set_field(bytes, 64, checked ? crc32c(all.subspan(wire::kHeaderBytes)) : 0U);
    set_field(bytes, 76, crc32c(all.first(76)));
  }
  if ((message.how & kBeside) != 0 && payload_at < bytes.size()) {
    message.beside.assign(bytes.begin() + static_cast<std::ptrdiff_t>(payload_at), bytes.end());
    bytes.resize(payload_at);
  }
}

/// The next message: how it is mended, its length, its bytes.
inline ScriptMessage next_message(Input& input, std::size_t slot_bytes) {
  ScriptMessage message;
  message.how = input.take<std::uint8_t>();
  const std::span<const std::byte> part = input.bytes(input.take<std::uint16_t>());
  message.bytes.assign(part.begin(), part.end());
  mend(message, slot_bytes);
  return message;
}

inline void put_message(Seed& seed, std::uint8_t how, std::span<const std::byte> message) {
  seed.put(how).put(static_cast<std::uint16_t>(message.size())).put_bytes(message);
}

}  // namespace pipelive::fuzz
