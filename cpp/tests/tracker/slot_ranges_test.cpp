#include "pipelive/tracker/slot_ranges.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/tracker/slot_bitmap.hpp"

namespace pipelive {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using Ranges = std::vector<SlotRange>;

template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(MergeRanges, SortsJoinsAndDropsEmptyOnes) {
  const Ranges ranges{{10, 5}, {0, 2}, {15, 1}, {2, 1}, {12, 1}, {40, 0}, {20, 3}};
  EXPECT_THAT(merge_ranges(ranges),
              ElementsAre(SlotRange{0, 3}, SlotRange{10, 6}, SlotRange{20, 3}));
  EXPECT_THAT(merge_ranges({}), IsEmpty());
}

TEST(MergeRanges, RefusesARangeThatWraps) {
  const Ranges ranges{{0, 1}, {std::numeric_limits<std::uint64_t>::max() - 1, 2}};
  EXPECT_THAT(refusal([&] { (void)merge_ranges(ranges); }), testing::HasSubstr("ranges[1]"));
}

TEST(RangesOfBlocks, JoinsNeighboursAndRepeats) {
  const std::vector<std::int64_t> ids{5, 3, 4, 3, 9};
  EXPECT_THAT(ranges_of_blocks(ids, 16), ElementsAre(SlotRange{48, 48}, SlotRange{144, 16}));
}

TEST(RangesOfBlocks, RefusesBadIdsAndBlockSizes) {
  const std::vector<std::int64_t> ids{5, -3};
  EXPECT_THAT(refusal([&] { (void)ranges_of_blocks(ids, 16); }),
              testing::HasSubstr("ids[1] is -3"));
  EXPECT_THAT(refusal([&] { (void)ranges_of_blocks({}, 0); }), testing::HasSubstr("block_size"));
}

TEST(IntersectRanges, KeepsWhatBothHold) {
  const Ranges a{{0, 10}, {20, 10}, {40, 1}};
  const Ranges b{{5, 20}, {29, 100}};
  EXPECT_THAT(intersect_ranges(a, b),
              ElementsAre(SlotRange{5, 5}, SlotRange{20, 5}, SlotRange{29, 1}, SlotRange{40, 1}));
  EXPECT_THAT(intersect_ranges(a, {}), IsEmpty());
}

TEST(IntersectRanges, RefusesListsThatAreNotNormal) {
  const Ranges good{{0, 1}};
  const Ranges touching{{0, 1}, {1, 1}};
  const Ranges empty{{3, 0}};
  EXPECT_THAT(refusal([&] { (void)intersect_ranges(good, touching); }), testing::HasSubstr("b[1]"));
  EXPECT_THAT(refusal([&] { (void)intersect_ranges(empty, good); }), testing::HasSubstr("a[0]"));
}

TEST(BlocksTouched, ListsEachBlockOnce) {
  const Ranges ranges{{0, 1}, {15, 2}, {18, 1}, {64, 32}};
  EXPECT_THAT(blocks_touched(ranges, 16), ElementsAre(0, 1, 4, 5));
  EXPECT_THAT(blocks_touched({}, 16), IsEmpty());
  EXPECT_THAT(refusal([&] { (void)blocks_touched(ranges, 0); }), testing::HasSubstr("block_size"));
}

TEST(CountSlots, AddsUp) {
  const Ranges ranges{{0, 1}, {15, 2}};
  EXPECT_EQ(count_slots(ranges), 3U);
}

// The bitmap against the plainest model: a vector of booleans.
class SlotBitmapModel : public testing::TestWithParam<std::uint64_t> {};

TEST_P(SlotBitmapModel, DrainsWhatWasSet) {
  const std::uint64_t slots = GetParam();
  std::mt19937_64 random(slots);
  SlotBitmap bitmap(slots);
  SlotBitmap other(slots);
  for (int round = 0; round < 50; ++round) {
    std::vector<bool> model(slots);
    const auto mark = [&](std::uint64_t begin, std::uint64_t count) {
      std::uint64_t fresh = 0;
      for (std::uint64_t slot = begin; slot < begin + count; ++slot) {
        fresh += model[slot] ? 0 : 1;
        model[slot] = true;
      }
      return fresh;
    };
    for (int i = 0; i < 8; ++i) {
      const std::uint64_t begin = random() % slots;
      const std::uint64_t count = random() % (1 + (random() % 2 == 0 ? slots - begin : 2));
      const std::uint64_t most = std::min(count, slots - begin);
      ASSERT_EQ(bitmap.set(begin, most), mark(begin, most));
    }
    const std::uint64_t begin = random() % slots;
    other.set(begin, slots - begin);
    ASSERT_EQ(bitmap.merge(other), mark(begin, slots - begin));
    other.clear();

    Ranges expected;
    for (std::uint64_t slot = 0; slot < slots; ++slot) {
      if (model[slot]) expected.push_back({slot, 1});
    }
    Ranges drained{{7, 7}};  // drain appends
    bitmap.drain(drained);
    ASSERT_EQ(drained.front(), (SlotRange{7, 7}));
    drained.erase(drained.begin());
    ASSERT_EQ(drained, merge_ranges(expected));
    Ranges nothing;
    bitmap.drain(nothing);
    ASSERT_TRUE(nothing.empty());
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, SlotBitmapModel,
                         testing::Values(1, 63, 64, 65, 128, 4096, 4097, 10000));

}  // namespace
}  // namespace pipelive
