#include "pipelive/transport/wire.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"

namespace pipelive::wire {
namespace {

std::vector<std::byte> data_message(std::uint8_t flags, std::size_t records, std::size_t payload) {
  std::vector<std::byte> message(message_bytes(records, payload));
  std::vector<Record> table;
  for (std::uint32_t i = 0; i < records; ++i) table.push_back({i * 100ULL, 7, 3, i});
  for (std::size_t i = 0; i < payload; ++i) {
    message[payload_offset(records) + i] = static_cast<std::byte>(i * 31);
  }
  write_records(message, table);
  Header header;
  header.kind = Kind::data;
  header.flags = flags;
  header.epoch = 11;
  header.round = 5;
  header.through_seq = 99;
  header.index = 2;
  header.records = static_cast<std::uint32_t>(records);
  header.payload_bytes = payload;
  const std::span<const std::byte> whole(message);
  write_header(message, header, crc32c(whole.subspan(kHeaderBytes)));
  return message;
}

ErrorCode refusal(std::span<const std::byte> bytes) {
  Message message;
  try {
    open_message(bytes, nullptr, message);
  } catch (const Error& error) {
    return error.code();
  }
  ADD_FAILURE() << "accepted";
  return ErrorCode::device;
}

// Gives a changed header a valid CRC again, so that the checks behind it are reached.
void reseal(std::span<std::byte> message) {
  const std::uint32_t crc = crc32c(message.first(76));
  std::memcpy(message.data() + 76, &crc, 4);
}

TEST(Wire, RoundTrip) {
  const std::vector<std::byte> bytes = data_message(kBodyChecksum, 5, 777);
  EXPECT_EQ(payload_offset(5) % kPayloadAlignment, 0U);
  for (const bool copied : {false, true}) {
    std::vector<std::byte> copy;
    Message message;
    open_message(bytes, copied ? &copy : nullptr, message);
    EXPECT_EQ(message.header.kind, Kind::data);
    EXPECT_EQ(message.header.epoch, 11U);
    EXPECT_EQ(message.header.round, 5U);
    EXPECT_EQ(message.header.through_seq, 99);
    EXPECT_EQ(message.header.index, 2U);
    ASSERT_EQ(message.records.size(), 5U);
    EXPECT_EQ(message.records[3], (Record{300, 7, 3, 3}));
    ASSERT_EQ(message.payload.size(), 777U);
    EXPECT_EQ(message.payload[100], static_cast<std::byte>(3100 & 0xFF));
    EXPECT_EQ(message.payload.data(), bytes.data() + payload_offset(5));
  }
}

TEST(Wire, WhatIsInterpretedIsCopiedWhereThePeerCanWrite) {
  std::vector<std::byte> data = data_message(kBodyChecksum, 3, 64);
  std::vector<std::byte> copy;
  Message message;
  open_message(data, &copy, message);
  const std::vector<Record> records = message.records;
  std::fill(data.begin(), data.end(), std::byte{0xFF});
  EXPECT_EQ(message.records, records);
  EXPECT_EQ(message.header.records, 3U);
  EXPECT_EQ(message.payload.size(), 64U);

  Header header;
  header.kind = Kind::round_end;
  header.flags = kBodyChecksum;
  const std::uint32_t layers[] = {1, 2};
  std::vector<std::byte> end = small_message(header, write_round_end({1, 2, 3}, layers));
  open_message(end, &copy, message);
  std::fill(end.begin(), end.end(), std::byte{0xFF});
  EXPECT_EQ(read_round_totals(message.payload), (RoundTotals{1, 2, 3}));
  EXPECT_EQ(read_round_layers(message.payload), (std::vector<std::uint32_t>{1, 2}));
}

TEST(Wire, TheLayoutIsFixed) {
  // What two versions of the program must agree on, byte for byte.
  const std::vector<std::byte> bytes = data_message(kBodyChecksum, 1, 4);
  ASSERT_EQ(bytes.size(), 128U + 4U);
  EXPECT_EQ(std::memcmp(bytes.data(), "PLKV", 4), 0);
  EXPECT_EQ(bytes[4], std::byte{1});   // version
  EXPECT_EQ(bytes[6], std::byte{2});   // data
  EXPECT_EQ(bytes[7], std::byte{1});   // flags
  EXPECT_EQ(bytes[8], std::byte{11});  // epoch
  EXPECT_EQ(bytes[16], std::byte{5});
  EXPECT_EQ(bytes[24], std::byte{99});
  EXPECT_EQ(bytes[36], std::byte{1});  // records
  EXPECT_EQ(bytes[40], std::byte{4});  // payload
  EXPECT_EQ(bytes[88], std::byte{7});  // generation of record 0
  EXPECT_EQ(bytes[96], std::byte{3});  // its slots
}

TEST(Wire, EveryFlippedBitIsSeen) {
  std::vector<std::byte> bytes = data_message(kBodyChecksum, 2, 50);
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    const ErrorCode code = refusal(bytes);
    EXPECT_TRUE(code == ErrorCode::corrupt || code == ErrorCode::protocol) << bit;
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
  }
}

TEST(Wire, EveryTruncationAndExtensionIsSeen) {
  std::vector<std::byte> bytes = data_message(0, 3, 60);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_EQ(refusal(std::span(bytes).first(size)), ErrorCode::protocol) << size;
  }
  bytes.push_back(std::byte{0});
  EXPECT_EQ(refusal(bytes), ErrorCode::protocol);
}

TEST(Wire, LengthsThatOverflowAreRefused) {
  const auto with = [](std::size_t at, auto value) {
    std::vector<std::byte> bytes = data_message(0, 2, 64);
    std::memcpy(bytes.data() + at, &value, sizeof value);
    reseal(bytes);
    return refusal(bytes);
  };
  for (const std::uint64_t payload :
       {std::uint64_t{0}, std::uint64_t{63}, std::uint64_t{65}, ~std::uint64_t{0},
        ~std::uint64_t{0} - 127, std::uint64_t{1} << 63}) {
    EXPECT_EQ(with(40, payload), ErrorCode::protocol) << payload;
  }
  for (const std::uint32_t records : {0U, 1U, 5U, 0xFFFFFFFFU, 0x80000000U, 0x0AAAAAABU}) {
    EXPECT_EQ(with(36, records), ErrorCode::protocol) << records;
  }
  EXPECT_EQ(with(24, std::int64_t{-2}), ErrorCode::protocol);
  EXPECT_EQ(with(6, std::uint8_t{0}), ErrorCode::protocol);
  EXPECT_EQ(with(6, std::uint8_t{11}), ErrorCode::protocol);
  EXPECT_EQ(with(7, std::uint8_t{2}), ErrorCode::protocol);
  EXPECT_EQ(with(4, std::uint16_t{2}), ErrorCode::protocol);
  EXPECT_EQ(with(68, std::uint32_t{1}), ErrorCode::protocol);
  EXPECT_EQ(with(72, std::uint32_t{1}), ErrorCode::protocol);
}

TEST(Wire, MutatedMessagesNeverCrash) {
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    std::vector<std::byte> bytes = data_message(random() % 2, random() % 4, random() % 100);
    for (std::uint64_t i = 0; i <= random() % 6; ++i) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    if (random() % 3 == 0) bytes.resize(random() % (bytes.size() + 20));
    if (random() % 2 == 0 && bytes.size() >= kHeaderBytes) reseal(bytes);
    std::vector<std::byte> copy;
    Message message;
    try {
      open_message(bytes, random() % 2 == 0 ? &copy : nullptr, message);
      EXPECT_EQ(message_bytes(message.records.size(), message.payload.size()), bytes.size());
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == ErrorCode::protocol || error.code() == ErrorCode::corrupt);
    }
  }
}

TEST(Wire, HelloMismatchesAreNamed) {
  const KVSpec spec{8, 128, DType::bfloat16, 16, BlockOrder::hnd};
  const std::uint32_t layers[] = {3, 4, 9};
  const Hello own = make_hello(spec, true, layers);
  EXPECT_EQ(read_hello(write_hello(own)), own);
  KVSpec other = spec;
  other.order = BlockOrder::nhd;
  EXPECT_EQ(describe_mismatch(make_hello(other, true, layers), own), "");
  other.block_size = 32;
  EXPECT_EQ(describe_mismatch(make_hello(other, true, layers), own),
            "block_size is 32 at the peer, 16 here");
  other = spec;
  other.dtype = DType::float16;
  other.head_dim = 64;
  EXPECT_EQ(describe_mismatch(make_hello(other, true, layers), own),
            "head_dim is 64 at the peer, 128 here; dtype is float16 at the peer, bfloat16 here");
  EXPECT_EQ(describe_mismatch(make_hello(spec, false, layers), own),
            "checksum is 0 at the peer, 1 here");
  const std::uint32_t others[] = {3, 5, 9};
  EXPECT_EQ(describe_mismatch(make_hello(spec, true, others), own),
            "the moving layers are not the same ones");
  EXPECT_NE(describe_mismatch(make_hello(spec, true, std::span(layers).first(2)), own), "");
}

TEST(Wire, RoundEnds) {
  const std::uint32_t layers[] = {1, 2, 7};
  const RoundTotals totals{4, 50, 600};
  const std::vector<std::byte> payload = write_round_end(totals, layers);
  EXPECT_EQ(read_round_totals(payload), totals);
  EXPECT_EQ(read_round_layers(payload), std::vector<std::uint32_t>(layers, layers + 3));
  EXPECT_THROW(static_cast<void>(read_round_layers(std::span(payload).first(25))), Error);
  EXPECT_THROW(static_cast<void>(read_round_totals(std::span(payload).first(23))), Error);
  const std::uint32_t unsorted[] = {2, 2};
  EXPECT_THROW(static_cast<void>(read_round_layers(write_round_end(totals, unsorted))), Error);
}

}  // namespace
}  // namespace pipelive::wire
