#include "pipelive/transport/checksum.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string_view>
#include <vector>

namespace pipelive {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::vector<std::byte> random_bytes(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

TEST(Crc32c, KnownVectors) {
  EXPECT_EQ(crc32c(bytes_of("123456789")), 0xE3069283U);
  EXPECT_EQ(crc32c_portable(bytes_of("123456789")), 0xE3069283U);
  EXPECT_EQ(crc32c({}), 0U);
  // RFC 3720, B.4.
  const std::vector<std::byte> zeros(32, std::byte{0});
  const std::vector<std::byte> ones(32, std::byte{0xFF});
  EXPECT_EQ(crc32c(zeros), 0x8A9136AAU);
  EXPECT_EQ(crc32c(ones), 0x62A8AB43U);
  std::vector<std::byte> ascending(32);
  for (std::size_t i = 0; i < 32; ++i) ascending[i] = static_cast<std::byte>(i);
  EXPECT_EQ(crc32c(ascending), 0x46DD794EU);
}

TEST(Crc32c, InterleavedStreamsAgreeWithTables) {
  const std::vector<std::byte> bytes = random_bytes(40000, 1);
  // Around every length at which the number of streams or their size changes, at odd starts.
  for (const std::size_t size : {0, 1, 7, 8, 9, 767, 768, 769, 1535, 1536, 12287, 12288, 12289,
                                 13056, 24576, 36864, 39990}) {
    for (const std::size_t start : {0, 1, 5}) {
      const auto piece = std::span<const std::byte>(bytes).subspan(start, size);
      ASSERT_EQ(crc32c(piece, 77), crc32c_portable(piece, 77)) << size << " from " << start;
    }
  }
}

TEST(Crc32c, ContinuesAndCopies) {
  const std::vector<std::byte> bytes = random_bytes(30001, 2);
  const std::span<const std::byte> all(bytes);
  EXPECT_EQ(crc32c(all.subspan(12345), crc32c(all.first(12345))), crc32c(all));
  std::vector<std::byte> copy(bytes.size());
  EXPECT_EQ(crc32c_copy(copy.data(), all, 9), crc32c(all, 9));
  EXPECT_EQ(copy, bytes);
}

TEST(Crc32c, SeesEverySingleFlippedBit) {
  std::vector<std::byte> bytes = random_bytes(900, 3);
  const std::uint32_t crc = crc32c(bytes);
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    ASSERT_NE(crc32c(bytes), crc) << bit;
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
  }
}

}  // namespace
}  // namespace pipelive
