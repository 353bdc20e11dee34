#include "pipelive/kv/geometry.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "device/device_test_tools.hpp"

namespace pipelive {
namespace {

TEST(Geometry, RefusesFieldsOutOfRange) {
  const Geometry good{1000, 10, 4, 100, 4096, 0};
  good.validate();
  const auto with = [&good](auto change) {
    Geometry geometry = good;
    change(geometry);
    geometry.validate();
  };
  EXPECT_ERROR(invalid_argument, "num_layers is 0", with([](Geometry& g) { g.num_layers = 0; }));
  EXPECT_ERROR(invalid_argument, "stack is 0", with([](Geometry& g) { g.stack = 0; }));
  EXPECT_ERROR(invalid_argument, "stack is 11", with([](Geometry& g) { g.stack = 11; }));
  EXPECT_ERROR(invalid_argument, "max_blocks is 0", with([](Geometry& g) { g.max_blocks = 0; }));
  EXPECT_ERROR(invalid_argument, "page_bytes is 0", with([](Geometry& g) { g.page_bytes = 0; }));
  EXPECT_ERROR(invalid_argument, "block_bytes is 0", with([](Geometry& g) { g.block_bytes = 0; }));
  EXPECT_ERROR(invalid_argument, "64 TiB", with([](Geometry& g) {
                 g.max_blocks = std::uint64_t{1} << 31;
                 g.block_bytes = std::size_t{1} << 30;
               }));
}

TEST(Geometry, TheLastStackMayBeSmaller) {
  const Geometry geometry{1000, 10, 4, 100, 4096, 0};
  EXPECT_EQ(geometry.num_stacks(), 3u);
  EXPECT_EQ(geometry.layers_in(0), 4u);
  EXPECT_EQ(geometry.layers_in(2), 2u);
  EXPECT_EQ(geometry.stride(0), 4000u);
  EXPECT_EQ(geometry.stride(2), 2000u);
  EXPECT_EQ(geometry.pages_for(0, 1), 1u);
  EXPECT_EQ(geometry.pages_for(0, 2), 2u);
  EXPECT_EQ(geometry.pages_for(0, 0), 0u);
}

TEST(Geometry, NamesTheStackThatIsNotWhole) {
  const Geometry geometry{1000, 10, 4, 100, 4096, 0};
  using Layers = std::vector<std::uint32_t>;
  EXPECT_EQ(geometry.stacks_of(Layers{9, 8, 0, 1, 2, 3}, "layers", true), (Layers{0, 2}));
  EXPECT_EQ(geometry.stacks_of(Layers{5}, "layers", false), Layers{1});
  EXPECT_ERROR(invalid_argument, "stack 1 holds layers 4 to 7",
               (void)geometry.stacks_of(Layers{4, 5, 7}, "layers", true));
  EXPECT_ERROR(invalid_argument, "layer 10 is not in the model",
               (void)geometry.stacks_of(Layers{10}, "layers", false));
  EXPECT_ERROR(invalid_argument, "layer 3 is named twice",
               (void)geometry.stacks_of(Layers{3, 3}, "layers", false));
}

// blocks_that_fit is the largest capacity whose bytes_needed is within the budget, exactly.
TEST(Geometry, BudgetAndCapacityAreInverse) {
  std::mt19937 random(20260412);
  const auto draw = [&random](std::uint64_t least, std::uint64_t most) {
    return std::uniform_int_distribution<std::uint64_t>(least, most)(random);
  };
  for (int round = 0; round < 3000; ++round) {
    Geometry geometry;
    geometry.block_bytes = draw(1, 50000);
    geometry.num_layers = static_cast<std::uint32_t>(draw(1, 12));
    geometry.stack = static_cast<std::uint32_t>(draw(1, geometry.num_layers));
    geometry.max_blocks = draw(1, 3000);
    geometry.page_bytes = std::size_t{1} << draw(9, 16);
    geometry.extra_pages = draw(0, 1);
    geometry.validate();
    std::vector<std::uint32_t> stacks(geometry.num_stacks());
    std::iota(stacks.begin(), stacks.end(), 0u);
    std::shuffle(stacks.begin(), stacks.end(), random);
    stacks.resize(draw(0, stacks.size()));

    const std::uint64_t capacity = draw(1, geometry.max_blocks);
    const std::uint64_t needed = geometry.bytes_needed(stacks, capacity);
    EXPECT_EQ(needed % geometry.page_bytes, 0u);
    EXPECT_GE(geometry.blocks_that_fit(stacks, needed), capacity);

    const std::uint64_t budget = draw(0, geometry.bytes_needed(stacks, geometry.max_blocks) * 2);
    const std::uint64_t fits = geometry.blocks_that_fit(stacks, budget);
    if (fits > 0) {
      EXPECT_LE(geometry.bytes_needed(stacks, fits), budget);
    }
    if (fits < geometry.max_blocks) {
      EXPECT_GT(geometry.bytes_needed(stacks, fits + 1), budget);
    }
  }
}

TEST(Geometry, ListsAFewOfMany) {
  const std::vector<std::uint64_t> many{1, 2, 3, 4};
  EXPECT_EQ(list_some(many, 2), "1, 2 and 2 more");
  EXPECT_EQ(list_some(many), "1, 2, 3, 4");
  EXPECT_EQ(list_some({}), "");
}

}  // namespace
}  // namespace pipelive
