#include "pipelive/transport/wire.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"

namespace pipelive::wire {
namespace {

static_assert(std::endian::native == std::endian::little,
              "the wire format is little-endian, and so are all machines this runs on so far");
static_assert(sizeof(Record) == kRecordBytes && sizeof(RoundTotals) == kRoundTotalsBytes &&
              sizeof(Hello) == kHelloBytes);

constexpr std::size_t kHeaderCrcAt = 76;

template <typename T>
void put(std::span<std::byte> bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <typename T>
T get(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorCode::protocol, "message refused: " + why);
}

std::string number(std::uint64_t value) {
  return std::to_string(value);
}

struct Crcs {
  std::uint32_t body = 0;
};

// Everything about a header that can be known without looking at the rest.
Header check_header(std::span<const std::byte> head, std::size_t size, std::size_t beside,
                    Crcs& crcs) {
  if (get<std::uint32_t>(head, 0) != kMagic) {
    refuse("magic is " + number(get<std::uint32_t>(head, 0)) + ", expected " + number(kMagic));
  }
  if (get<std::uint16_t>(head, 4) != kVersion) {
    refuse("version is " + number(get<std::uint16_t>(head, 4)) + ", expected " + number(kVersion));
  }
  const std::uint32_t crc = crc32c(head.first(kHeaderCrcAt));
  if (crc != get<std::uint32_t>(head, kHeaderCrcAt)) {
    throw Error(ErrorCode::corrupt, "message header: its CRC32C is " + number(crc) +
                                        ", the header says " +
                                        number(get<std::uint32_t>(head, kHeaderCrcAt)));
  }
  Header header;
  const auto kind = get<std::uint8_t>(head, 6);
  if (kind < static_cast<std::uint8_t>(Kind::hello) ||
      kind > static_cast<std::uint8_t>(Kind::abort)) {
    refuse("kind is " + number(kind) + ", expected 1 to 10");
  }
  header.kind = static_cast<Kind>(kind);
  header.flags = get<std::uint8_t>(head, 7);
  if ((header.flags & ~(kBodyChecksum | kPayloadBeside)) != 0) {
    refuse("flags are " + number(header.flags));
  }
  header.epoch = get<std::uint64_t>(head, 8);
  header.round = get<std::uint64_t>(head, 16);
  header.through_seq = get<std::int64_t>(head, 24);
  header.index = get<std::uint32_t>(head, 32);
  header.records = get<std::uint32_t>(head, 36);
  header.payload_bytes = get<std::uint64_t>(head, 40);
  header.id = get<std::uint64_t>(head, 48);
  header.offset = get<std::uint64_t>(head, 56);
  crcs.body = get<std::uint32_t>(head, 64);
  if (get<std::uint64_t>(head, 68) != 0) refuse("a reserved field of the header is not 0");
  if (header.through_seq < -1) {
    refuse("through_seq is " + std::to_string(header.through_seq) + ", expected -1 or more");
  }
  // 2^32 records of 24 bytes cannot overflow 64 bits; the payload can, so it is compared, not
  // added.
  const std::size_t offset = payload_offset(header.records);
  const bool is_beside = (header.flags & kPayloadBeside) != 0;
  if (is_beside && header.kind != Kind::data && header.kind != Kind::region) {
    refuse("a " + std::string(to_string(header.kind)) + " has no payload beside it");
  }
  if (is_beside ? (beside == 0 || header.payload_bytes != beside) : beside != 0) {
    refuse(number(beside) + " bytes came beside it, it says " +
           number(is_beside ? header.payload_bytes : 0));
  }
  if (offset > size || (is_beside ? 0 : header.payload_bytes) != size - offset) {
    refuse(number(header.records) + " records and a payload of " + number(header.payload_bytes) +
           " bytes do not make the " + number(size) + " bytes that arrived");
  }
  return header;
}

}  // namespace

std::string_view to_string(Kind kind) noexcept {
  switch (kind) {
    case Kind::hello:
      return "hello";
    case Kind::data:
      return "data";
    case Kind::round_end:
      return "round_end";
    case Kind::ack:
      return "ack";
    case Kind::verify_request:
      return "verify_request";
    case Kind::verify_reply:
      return "verify_reply";
    case Kind::region:
      return "region";
    case Kind::region_end:
      return "region_end";
    case Kind::finish:
      return "finish";
    case Kind::abort:
      return "abort";
  }
  return "unknown";
}

Hello make_hello(const KVSpec& spec, bool checksum, std::span<const std::uint32_t> layers) {
  Hello hello;
  hello.block_size = spec.block_size;
  hello.num_kv_heads = spec.num_kv_heads;
  hello.head_dim = spec.head_dim;
  hello.dtype = static_cast<std::uint32_t>(spec.dtype);
  hello.checksum = checksum ? 1 : 0;
  hello.num_layers = static_cast<std::uint32_t>(layers.size());
  hello.layers_crc = crc32c(std::as_bytes(layers));
  return hello;
}

std::string describe_mismatch(const Hello& peer, const Hello& own) {
  std::string text;
  const auto compare = [&text](const char* name, std::uint32_t theirs, std::uint32_t ours) {
    if (theirs == ours) return;
    if (!text.empty()) text += "; ";
    text += std::string(name) + " is " + number(theirs) + " at the peer, " + number(ours) + " here";
  };
  compare("block_size", peer.block_size, own.block_size);
  compare("num_kv_heads", peer.num_kv_heads, own.num_kv_heads);
  compare("head_dim", peer.head_dim, own.head_dim);
  if (peer.dtype != own.dtype) {
    const auto name = [](std::uint32_t dtype) {
      return dtype > 2 ? number(dtype) : std::string(to_string(static_cast<DType>(dtype)));
    };
    if (!text.empty()) text += "; ";
    text += "dtype is " + name(peer.dtype) + " at the peer, " + name(own.dtype) + " here";
  }
  compare("checksum", peer.checksum, own.checksum);
  compare("the number of moving layers", peer.num_layers, own.num_layers);
  if (peer.num_layers == own.num_layers && peer.layers_crc != own.layers_crc) {
    if (!text.empty()) text += "; ";
    text += "the moving layers are not the same ones";
  }
  if (text.empty()) compare("reserved", peer.reserved, own.reserved);
  return text;
}

void write_records(std::span<std::byte> message, std::span<const Record> records) {
  const std::size_t end = kHeaderBytes + records.size_bytes();
  if (!records.empty()) {
    std::memcpy(message.data() + kHeaderBytes, records.data(), records.size_bytes());
  }
  std::memset(message.data() + end, 0, payload_offset(records.size()) - end);
}

std::uint32_t records_crc(std::span<const std::byte> message, std::size_t records) {
  return crc32c(message.subspan(kHeaderBytes, payload_offset(records) - kHeaderBytes));
}

void write_header(std::span<std::byte> message, const Header& header, std::uint32_t body_crc) {
  put<std::uint32_t>(message, 0, kMagic);
  put<std::uint16_t>(message, 4, kVersion);
  put<std::uint8_t>(message, 6, static_cast<std::uint8_t>(header.kind));
  put<std::uint8_t>(message, 7, header.flags);
  put(message, 8, header.epoch);
  put(message, 16, header.round);
  put(message, 24, header.through_seq);
  put(message, 32, header.index);
  put(message, 36, header.records);
  put(message, 40, header.payload_bytes);
  put(message, 48, header.id);
  put(message, 56, header.offset);
  put<std::uint32_t>(message, 64, (header.flags & kBodyChecksum) != 0 ? body_crc : 0);
  put<std::uint64_t>(message, 68, 0);
  put<std::uint32_t>(message, kHeaderCrcAt, crc32c(message.first(kHeaderCrcAt)));
}

std::vector<std::byte> small_message(Header header, std::span<const std::byte> payload) {
  header.records = 0;
  header.payload_bytes = payload.size();
  std::vector<std::byte> message(message_bytes(0, payload.size()));
  write_records(message, {});
  if (!payload.empty()) {
    std::memcpy(message.data() + payload_offset(0), payload.data(), payload.size());
  }
  write_header(message, header, crc32c(std::span<const std::byte>(message).subspan(kHeaderBytes)));
  return message;
}

void open_message(std::span<const std::byte> bytes, std::vector<std::byte>* copy, Message& message,
                  const Beside* beside) {
  if (bytes.size() < payload_offset(0)) {
    refuse("it has " + number(bytes.size()) + " bytes, expected " + number(payload_offset(0)) +
           " or more");
  }
  // From here on what is looked at twice is looked at in `inner`.
  const auto keep = [&](std::size_t size) {
    if (copy == nullptr) return bytes.first(size);
    const std::size_t kept = copy->size();
    copy->resize(size);
    std::memcpy(copy->data() + kept, bytes.data() + kept, size - kept);
    return std::span<const std::byte>(*copy);
  };
  if (copy != nullptr) copy->clear();
  Crcs crcs;
  message.header =
      check_header(keep(kHeaderBytes), bytes.size(), beside ? beside->bytes.size() : 0, crcs);
  const bool bulk = message.header.kind == Kind::data || message.header.kind == Kind::region;
  const std::size_t records = message.header.records;
  const std::size_t offset = payload_offset(records);
  const std::span<const std::byte> inner = keep(bulk ? offset : bytes.size());
  message.payload = message.beside() ? beside->bytes
                    : bulk           ? bytes.subspan(offset)
                                     : inner.subspan(offset);
  if ((message.header.flags & kBodyChecksum) != 0) {
    const std::uint32_t seed = crc32c(inner.subspan(kHeaderBytes, offset - kHeaderBytes));
    const std::uint32_t crc =
        message.beside() ? beside->crc(message.payload, seed) : crc32c(message.payload, seed);
    if (crc != crcs.body) {
      throw Error(ErrorCode::corrupt,
                  "message body (" + std::string(to_string(message.header.kind)) + ", " +
                      number(bytes.size() - kHeaderBytes) + " bytes): its CRC32C is " +
                      number(crc) + ", the header says " + number(crcs.body));
    }
  }
  const std::span<const std::byte> table = inner.subspan(kHeaderBytes, records * kRecordBytes);
  const std::span<const std::byte> padding =
      inner.subspan(kHeaderBytes + table.size(), offset - kHeaderBytes - table.size());
  if (std::any_of(padding.begin(), padding.end(), [](std::byte b) { return b != std::byte{0}; })) {
    refuse("the padding after its records is not 0");
  }
  message.records.resize(records);
  if (records != 0) std::memcpy(message.records.data(), table.data(), table.size());
}

RoundTotals read_round_totals(std::span<const std::byte> payload) {
  if (payload.size() < kRoundTotalsBytes) {
    refuse("a round_end has " + number(payload.size()) + " bytes, expected " +
           number(kRoundTotalsBytes) + " or more");
  }
  return get<RoundTotals>(payload, 0);
}

std::vector<std::byte> write_round_end(const RoundTotals& totals,
                                       std::span<const std::uint32_t> layers) {
  std::vector<std::byte> payload(kRoundTotalsBytes + layers.size_bytes());
  put(std::span<std::byte>(payload), 0, totals);
  if (!layers.empty()) {
    std::memcpy(payload.data() + kRoundTotalsBytes, layers.data(), layers.size_bytes());
  }
  return payload;
}

std::vector<std::uint32_t> read_round_layers(std::span<const std::byte> payload) {
  static_cast<void>(read_round_totals(payload));
  const std::span<const std::byte> rest = payload.subspan(kRoundTotalsBytes);
  if (rest.size() % sizeof(std::uint32_t) != 0) {
    refuse("the layers of a round_end have " + number(rest.size()) + " bytes, not a multiple of 4");
  }
  std::vector<std::uint32_t> layers(rest.size() / sizeof(std::uint32_t));
  if (!layers.empty()) std::memcpy(layers.data(), rest.data(), rest.size());
  if (std::adjacent_find(layers.begin(), layers.end(), std::greater_equal<>{}) != layers.end()) {
    refuse("the layers of a round_end are not strictly ascending");
  }
  return layers;
}

Hello read_hello(std::span<const std::byte> payload) {
  if (payload.size() != kHelloBytes) {
    refuse("a hello has " + number(payload.size()) + " bytes, expected " + number(kHelloBytes));
  }
  return get<Hello>(payload, 0);
}

std::vector<std::byte> write_hello(const Hello& hello) {
  std::vector<std::byte> payload(kHelloBytes);
  put(std::span<std::byte>(payload), 0, hello);
  return payload;
}

}  // namespace pipelive::wire
