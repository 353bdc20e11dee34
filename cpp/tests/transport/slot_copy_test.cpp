#include "pipelive/transport/slot_copy.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"
#include "transport/test_layers.hpp"

namespace pipelive {
namespace {

using test::PlainLayer;
using test::random_ranges;
using test::total;

KVSpec spec_of(std::uint32_t heads, std::uint32_t dim, BlockOrder order,
               std::uint32_t block_size = 16, DType dtype = DType::bfloat16) {
  return {heads, dim, dtype, block_size, order};
}

struct Case {
  KVSpec spec;
  std::size_t stack;
};

class SlotCopy : public ::testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(
    Layouts, SlotCopy,
    ::testing::Values(Case{spec_of(3, 64, BlockOrder::hnd), 1},
                      Case{spec_of(3, 64, BlockOrder::nhd), 1},
                      Case{spec_of(8, 128, BlockOrder::hnd), 4},
                      Case{spec_of(8, 128, BlockOrder::nhd), 2},
                      Case{spec_of(1, 32, BlockOrder::hnd), 3},
                      Case{spec_of(2, 33, BlockOrder::nhd, 7, DType::float32), 1},
                      Case{spec_of(2, 5, BlockOrder::hnd, 1, DType::float16), 2},
                      Case{spec_of(1, 1, BlockOrder::hnd, 4096), 1}));

TEST_P(SlotCopy, PacksInCanonicalOrder) {
  PlainLayer layer(GetParam().spec, 9, GetParam().stack);
  layer.fill(1);
  const std::size_t slot_bytes = layer.layout.slot_bytes();
  const std::uint64_t block = layer.spec.block_size;
  // A range that begins and ends inside blocks and spans whole ones.
  const SlotRange range{block / 2, std::min(layer.slots() - block, 3 * block + 1)};
  std::vector<std::byte> packed(range.count * slot_bytes);
  gather(layer.layout, layer.memory, {&range, 1}, packed);
  std::vector<std::byte> expected;
  const std::size_t fragment = layer.layout.fragment_bytes;
  for (std::uint64_t slot = range.begin; slot < range.end();) {
    const std::uint64_t end = std::min(range.end(), (slot / block + 1) * block);
    for (std::size_t f = 0; f < layer.layout.fragment_offsets.size(); ++f) {
      for (std::uint64_t s = slot; s < end; ++s) {
        const std::vector<std::byte> state = layer.slot(s);
        const auto at = state.begin() + static_cast<std::ptrdiff_t>(f * fragment);
        expected.insert(expected.end(), at, at + static_cast<std::ptrdiff_t>(fragment));
      }
    }
    slot = end;
  }
  EXPECT_EQ(packed, expected);
}

TEST_P(SlotCopy, ScatterIsTheInverse) {
  std::mt19937_64 random(7);
  PlainLayer source(GetParam().spec, 40, GetParam().stack);
  source.fill(2);
  for (const std::uint64_t longest : {1ULL, 5ULL, 100ULL}) {
    PlainLayer target(GetParam().spec, 40, 1);
    target.fill(3);
    PlainLayer expected(GetParam().spec, 40, 1);
    expected.bytes = target.bytes;
    const std::vector<SlotRange> ranges = random_ranges(random, source.slots(), 30, longest);
    std::vector<std::byte> packed(total(ranges) * source.layout.slot_bytes());
    gather(source.layout, source.memory, ranges, packed);
    scatter(target.layout, target.memory, ranges, packed);
    std::vector<bool> written(source.slots());
    for (const SlotRange& range : ranges) {
      for (std::uint64_t s = range.begin; s < range.end(); ++s) written[s] = true;
    }
    for (std::uint64_t s = 0; s < source.slots(); ++s) {
      ASSERT_EQ(target.slot(s), written[s] ? source.slot(s) : expected.slot(s)) << s;
    }
    // The guard behind the last block.
    const auto guard = static_cast<std::ptrdiff_t>(40 * target.stride);
    EXPECT_TRUE(std::equal(target.bytes.begin() + guard, target.bytes.end(),
                           expected.bytes.begin() + guard));
  }
}

TEST_P(SlotCopy, EndsWithOtherLayoutsAgree) {
  std::mt19937_64 random(11);
  PlainLayer source(GetParam().spec, 12, GetParam().stack);
  source.fill(4);
  KVSpec other = GetParam().spec;
  other.order = other.order == BlockOrder::hnd ? BlockOrder::nhd : BlockOrder::hnd;
  PlainLayer target(other, 12, 3);
  const std::vector<SlotRange> ranges = random_ranges(random, source.slots(), 12, 60);
  std::vector<std::byte> packed(total(ranges) * source.layout.slot_bytes());
  const std::uint32_t crc = gather_crc(source.layout, source.memory, ranges, packed, 5);
  EXPECT_EQ(crc, crc32c(packed, 5));
  scatter(target.layout, target.memory, ranges, packed);
  for (const SlotRange& range : ranges) {
    for (std::uint64_t s = range.begin; s < range.end(); ++s) {
      ASSERT_EQ(target.slot(s), source.slot(s)) << s;
    }
  }
  EXPECT_EQ(digest(source.layout, source.memory, ranges),
            digest(target.layout, target.memory, ranges));
  EXPECT_EQ(digest(source.layout, source.memory, ranges), crc32c(packed));
}

TEST_P(SlotCopy, PartWritesOnlyItsSlots) {
  std::mt19937_64 random(13);
  PlainLayer source(GetParam().spec, 8, 1);
  source.fill(5);
  for (int trial = 0; trial < 20; ++trial) {
    const SlotRange range = random_ranges(random, source.slots(), 1, 70).front();
    const std::uint64_t skip = random() % range.count;
    const SlotRange part{range.begin + skip, 1 + random() % (range.count - skip)};
    std::vector<std::byte> packed(range.count * source.layout.slot_bytes());
    gather(source.layout, source.memory, {&range, 1}, packed);
    PlainLayer target(GetParam().spec, 8, 2);
    const std::vector<std::byte> blank = target.slot(0);
    scatter_part(target.layout, target.memory, range, packed, part);
    for (std::uint64_t s = 0; s < source.slots(); ++s) {
      const bool in = s >= part.begin && s < part.end();
      ASSERT_EQ(target.slot(s), in ? source.slot(s) : blank) << s;
    }
  }
}

TEST(SlotCopyErrors, RangesOutsideTheLayerAreRefused) {
  PlainLayer layer(spec_of(1, 8, BlockOrder::hnd), 2);
  std::vector<std::byte> packed(layer.layout.slot_bytes() * 4);
  constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();
  for (const SlotRange& range : {SlotRange{29, 4}, SlotRange{32, 1}, SlotRange{kHuge, 4},
                                 SlotRange{4, kHuge}, SlotRange{kHuge - 2, 4}}) {
    EXPECT_THROW(gather(layer.layout, layer.memory, {&range, 1}, packed), Error);
    EXPECT_THROW(scatter(layer.layout, layer.memory, {&range, 1}, packed), Error);
  }
  const SlotRange fine{28, 4};
  EXPECT_NO_THROW(gather(layer.layout, layer.memory, {&fine, 1}, packed));
  packed.pop_back();
  EXPECT_THROW(gather(layer.layout, layer.memory, {&fine, 1}, packed), Error);
  EXPECT_THROW(scatter_part(layer.layout, layer.memory, fine, packed, fine), Error);
}

}  // namespace
}  // namespace pipelive
