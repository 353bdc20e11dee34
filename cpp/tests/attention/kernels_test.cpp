#include "../../src/attention/kernels.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../src/attention/dispatch.hpp"
#include "attention/attention_reference.hpp"

namespace pipelive {
namespace {

using attention_detail::Kernels;

class KernelsOf : public ::testing::TestWithParam<Isa> {
 protected:
  const Kernels& kernels = attention_detail::kernels_of(GetParam());
};

INSTANTIATE_TEST_SUITE_P(All, KernelsOf, ::testing::ValuesIn(available_isas()),
                         [](const auto& values) { return std::string(to_string(values.param)); });

TEST_P(KernelsOf, WidenEveryNumberOf16Bits) {
  std::vector<std::uint16_t> all(1u << 16);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  std::vector<float> wide(all.size());
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (std::size_t i = 0; i < all.size(); i += 64) {
      kernels.widen[static_cast<int>(dtype)](&all[i], &wide[i], 64, 64);
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float expected = testing::to_float(dtype, reinterpret_cast<const std::byte*>(&all[i]));
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(wide[i])) << i;
      } else {
        EXPECT_EQ(wide[i], expected) << i;
        EXPECT_EQ(std::signbit(wide[i]), std::signbit(expected)) << i;
      }
    }
  }
}

TEST_P(KernelsOf, WidenPadsWithZeros) {
  const std::vector<float> from(24, 3.0f);
  std::vector<float> to(32, 9.0f);
  kernels.widen[0](from.data(), to.data(), 24, 32);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(to[static_cast<std::size_t>(i)], i < 24 ? 3.0f : 0.0f);
}

TEST_P(KernelsOf, NarrowUndoesWiden) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (std::uint32_t first = 0; first < (1u << 16); first += 8) {
      std::uint16_t from[8];
      float wide[16];
      std::uint16_t to[8];
      for (std::uint32_t i = 0; i < 8; ++i) from[i] = static_cast<std::uint16_t>(first + i);
      kernels.widen[static_cast<int>(dtype)](from, wide, 8, 16);
      kernels.narrow[static_cast<int>(dtype)](wide, 1.0f, to, 8);
      for (int i = 0; i < 8; ++i) {
        if (!std::isnan(wide[i])) {
          EXPECT_EQ(from[i], to[i]);
        }
      }
    }
  }
}

struct Partials {
  std::vector<float> acc, max, sum;
};

TEST_P(KernelsOf, FoldMergesSoftmaxes) {
  constexpr int kRows = 3;
  constexpr int kStride = 32;
  const float inf = std::numeric_limits<float>::infinity();
  // Row 0: the later split has the larger maximum; row 1: the earlier; row 2: nothing in one.
  Partials a{{}, {1.0f, 9.0f, -inf}, {2.0f, 3.0f, 0.0f}};
  const Partials b{{}, {5.0f, -200.0f, 4.0f}, {1.5f, 1.0f, 2.5f}};
  Partials merged = a;
  merged.acc.resize(kRows * kStride);
  std::vector<float> b_acc(kRows * kStride);
  for (int i = 0; i < kRows * kStride; ++i) {
    merged.acc[static_cast<std::size_t>(i)] = i < 2 * kStride ? 0.25f * static_cast<float>(i) : 0;
    b_acc[static_cast<std::size_t>(i)] = 1.0f - static_cast<float>(i);
  }
  a.acc = merged.acc;
  kernels.fold(kRows, kStride, merged.acc.data(), merged.max.data(), merged.sum.data(),
               b_acc.data(), b.max.data(), b.sum.data());
  for (std::size_t r = 0; r < kRows; ++r) {
    const double most = std::max(a.max[r], b.max[r]);
    const double wa = std::exp2(a.max[r] - most);
    const double wb = std::exp2(b.max[r] - most);
    EXPECT_EQ(merged.max[r], static_cast<float>(most));
    EXPECT_NEAR(merged.sum[r], wa * a.sum[r] + wb * b.sum[r], 1e-6);
    for (std::size_t d = 0; d < kStride; ++d) {
      const std::size_t i = r * kStride + d;
      EXPECT_NEAR(merged.acc[i], wa * a.acc[i] + wb * b_acc[i], 1e-5);
    }
  }
}

TEST_P(KernelsOf, FoldingAnEmptySplitInChangesNoBit) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> acc(32, 0.1f);
  float max = 3.3f;
  float sum = 1.7f;
  const std::vector<float> zeros(32, 0.0f);
  const float no_max = -inf;
  const float no_sum = 0;
  kernels.fold(1, 32, acc.data(), &max, &sum, zeros.data(), &no_max, &no_sum);
  EXPECT_EQ(max, 3.3f);
  EXPECT_EQ(sum, 1.7f);
  EXPECT_EQ(acc, std::vector<float>(32, 0.1f));
  // And the other way round: an empty total becomes the split.
  std::vector<float> empty(32, 0.0f);
  float total_max = -inf;
  float total_sum = 0;
  kernels.fold(1, 32, empty.data(), &total_max, &total_sum, acc.data(), &max, &sum);
  EXPECT_EQ(total_max, 3.3f);
  EXPECT_EQ(total_sum, 1.7f);
  EXPECT_EQ(empty, acc);
}

TEST(Splits, DependOnThePositionAlone) {
  using attention_detail::split_len_at;
  EXPECT_EQ(split_len_at(0), 512);
  EXPECT_EQ(split_len_at(16383), 512);
  EXPECT_EQ(split_len_at(16384), 1024);
  EXPECT_EQ(split_len_at(32767), 1024);
  EXPECT_EQ(split_len_at(32768), 2048);
  for (std::int64_t position = 0; position < std::numeric_limits<std::int32_t>::max();
       position = position * 2 + 1) {
    EXPECT_LE(position / split_len_at(position) + 1, 32);
  }
}

TEST(Plans, TilesCoverEveryRowOnceAndKeepToOneSplitLength) {
  testing::Batch batch(DType::float32, 15, 3, 8, 64, {20000, 3, 40}, {3700, 1, 40});
  AttentionArgs args = batch.args();
  args.window = 100;
  const attention_detail::Plan plan = attention_detail::make_plan(args);
  std::vector<int> seen(static_cast<std::size_t>(batch.tokens * 5));
  for (const attention_detail::RowTile& tile : plan.tiles) {
    EXPECT_LE(tile.rows, attention_detail::kMaxRows);
    for (int r = 0; r < tile.rows; ++r) {
      const std::int64_t row = tile.first_row + r;
      ++seen[static_cast<std::size_t>(tile.first_token * 5 + row)];
      const std::int64_t position = tile.position + row / 5;
      EXPECT_EQ(attention_detail::split_len_at(position), tile.split_len);
      EXPECT_LT(position, tile.kv_end);
      EXPECT_LE(tile.kv_begin, std::max<std::int64_t>(0, position - 99));
    }
  }
  for (const int count : seen) EXPECT_EQ(count, 1);
}

}  // namespace
}  // namespace pipelive
