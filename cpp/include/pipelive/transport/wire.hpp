#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "pipelive/kv/spec.hpp"

/// The canonical wire format. A message is
///
///     header (80 bytes) | record table (24 bytes each) | zeros up to a multiple of 64 | payload
///
/// The payload of `data` and `region` messages may go beside the message instead, in a device's
/// memory (`kPayloadBeside`; see Channel::acquire_bulk); its checksum is the same.
///
/// in little-endian byte order. Both ends of a patch connection send such messages and nothing
/// else; what separates one from the next is the channel's business. The header carries a CRC32C of
/// itself, always; the rest carries one when the message says so (`kBodyChecksum`), which the two
/// ends agree on in their hello. Nothing that arrives is used before it was checked: `open_message`
/// checks the frame, and the receiver of a message checks every index in it against what it serves.
///
/// header, offsets in bytes:
///
///     0 u32 magic "PLKV"    4 u16 version         6 u8 kind             7 u8 flags
///     8 u64 epoch          16 u64 round          24 i64 through_seq    32 u32 index   36 u32
///     records
///    40 u64 payload bytes  48 u64 id             56 u64 offset
///    64 u32 body CRC32C    68 u32 reserved (0)   72 u32 reserved (0)   76 u32 header CRC32C of
///    0..75
///
/// record: 0 u64 first slot   8 u64 generation   16 u32 slots   20 u32 layer
namespace pipelive::wire {

inline constexpr std::uint32_t kMagic = 0x564B4C50;  // "PLKV"
inline constexpr std::uint16_t kVersion = 1;
inline constexpr std::size_t kHeaderBytes = 80;
inline constexpr std::size_t kRecordBytes = 24;
inline constexpr std::size_t kPayloadAlignment = 64;

enum class Kind : std::uint8_t {
  hello = 1,       ///< both ways, once: payload is a Hello; a mismatch is refused by name
  data,            ///< records and the packed slots they name; `index` counts within the round
  round_end,       ///< payload is RoundTotals and then one u32 per layer of the round
  ack,             ///< `round`: how many rounds are completely applied, without a gap
  verify_request,  ///< records are ranges, their layer kEveryLayer; `index` numbers the request
  verify_reply,    ///< payload: one u64 digest per moving layer, ascending; `index` of the request
  region,          ///< `id`, `offset`; payload goes to that place of the region
  region_end,      ///< `id`; `offset` is the region's total
  finish,          ///< nothing more comes; answered by a finish when all is applied
  abort,           ///< `id` is the ErrorCode, payload the reason as UTF-8
};

[[nodiscard]] std::string_view to_string(Kind kind) noexcept;

inline constexpr std::uint8_t kBodyChecksum = 1;   ///< flag: the body CRC is filled in
inline constexpr std::uint8_t kPayloadBeside = 2;  ///< flag: the payload lies beside the message
inline constexpr std::uint32_t kEveryLayer = 0xFFFFFFFFU;

struct Header {
  Kind kind = Kind::data;
  std::uint8_t flags = 0;
  std::uint64_t epoch = 0;
  std::uint64_t round = 0;        ///< counted by the sender from 0 without gaps
  std::int64_t through_seq = -1;  ///< all writes of steps up to this one are in the rounds so far
  std::uint32_t index = 0;
  std::uint32_t records = 0;
  std::uint64_t payload_bytes = 0;
  std::uint64_t id = 0;
  std::uint64_t offset = 0;
};

/// Slots of one layer. Their generation is the number of the round that packed them plus one, so
/// that 0 is older than everything: a round packs after the one before, so its bytes are never
/// older. (The through_seq would not do: a collect can find writes without a step having been
/// completed.)
struct Record {
  std::uint64_t begin = 0;
  std::uint64_t generation = 0;
  std::uint32_t count = 0;
  std::uint32_t layer = 0;
  friend bool operator==(const Record&, const Record&) = default;
};

/// What a finished round consisted of, so that the receiver knows when it has all of it.
struct RoundTotals {
  std::uint64_t messages = 0;
  std::uint64_t records = 0;
  std::uint64_t slots = 0;
  friend bool operator==(const RoundTotals&, const RoundTotals&) = default;
};
inline constexpr std::size_t kRoundTotalsBytes = 24;

/// What the two ends must agree on before the first byte of a patch. Memory order may differ.
struct Hello {
  std::uint32_t block_size = 0;
  std::uint32_t num_kv_heads = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t dtype = 0;
  std::uint32_t checksum = 0;  ///< 1: every body carries its CRC
  std::uint32_t num_layers = 0;
  std::uint32_t layers_crc = 0;  ///< CRC32C of the ascending u32 layer ids
  std::uint32_t reserved = 0;
  friend bool operator==(const Hello&, const Hello&) = default;
};
inline constexpr std::size_t kHelloBytes = 32;

[[nodiscard]] Hello make_hello(const KVSpec& spec, bool checksum,
                               std::span<const std::uint32_t> layers);
/// Empty where both agree, else "block_size is 32 at the peer, 16 here; dtype is ...".
[[nodiscard]] std::string describe_mismatch(const Hello& peer, const Hello& own);

/// Where the payload begins in a message with this many records.
[[nodiscard]] constexpr std::size_t payload_offset(std::size_t records) noexcept {
  const std::size_t end = kHeaderBytes + records * kRecordBytes;
  return (end + kPayloadAlignment - 1) / kPayloadAlignment * kPayloadAlignment;
}
[[nodiscard]] constexpr std::size_t message_bytes(std::size_t records,
                                                  std::size_t payload) noexcept {
  return payload_offset(records) + payload;
}

/// Writes the record table and the zeros after it; `message` is the whole message.
void write_records(std::span<std::byte> message, std::span<const Record> records);
/// CRC32C of the record table and its padding, to be continued over the payload.
[[nodiscard]] std::uint32_t records_crc(std::span<const std::byte> message, std::size_t records);
/// Writes the header, last of all; `body_crc` is ignored unless the flags carry kBodyChecksum.
void write_header(std::span<std::byte> message, const Header& header, std::uint32_t body_crc);

/// A whole small message: header, no records, `payload`.
[[nodiscard]] std::vector<std::byte> small_message(Header header,
                                                   std::span<const std::byte> payload = {});

/// A message whose frame was checked. `payload` refers to the bytes it was opened from or, where it
/// was copied, to the copy.
struct Message {
  Header header;
  std::vector<Record> records;
  std::span<const std::byte> payload;
  /// `payload` came beside the message: it may lie where the host cannot look.
  [[nodiscard]] bool beside() const noexcept { return (header.flags & kPayloadBeside) != 0; }
};

/// What came beside a message, and how it is summed up.
struct Beside {
  std::span<const std::byte> bytes;
  std::function<std::uint32_t(std::span<const std::byte> bytes, std::uint32_t seed)> crc;
};

/// Checks the frame of what arrived: magic, version, header CRC, kind, flags, reserved fields, and
/// that the sizes fill `bytes` exactly; then the body's CRC if the message carries one. Throws
/// Error(protocol), or Error(corrupt) where a CRC does not agree.
///
/// `copy` is for a peer that still can write into `bytes`: the header, the records and every
/// payload that somebody interprets are first copied there, and only the copy is looked at. The
/// payload of `data` and `region` messages stays where it is: it goes to its place as it is, and
/// what that peer can do to it between the check and the copy it could have done before the check.
/// Null where nobody else can write. The vectors keep their memory from call to call.
/// `beside` is what came beside the message, or null; the header must say the same.
void open_message(std::span<const std::byte> bytes, std::vector<std::byte>* copy, Message& message,
                  const Beside* beside = nullptr);

[[nodiscard]] RoundTotals read_round_totals(std::span<const std::byte> payload);
[[nodiscard]] std::vector<std::byte> write_round_end(const RoundTotals& totals,
                                                     std::span<const std::uint32_t> layers);
/// The layers after the totals. Throws Error(protocol) unless they are strictly ascending.
[[nodiscard]] std::vector<std::uint32_t> read_round_layers(std::span<const std::byte> payload);

[[nodiscard]] Hello read_hello(std::span<const std::byte> payload);
[[nodiscard]] std::vector<std::byte> write_hello(const Hello& hello);

}  // namespace pipelive::wire
