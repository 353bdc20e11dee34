#include "pipelive/attention/attention.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention/attention_reference.hpp"
#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

using testing::Batch;

double tolerance(DType dtype) {
  return dtype == DType::float32 ? 2e-5 : dtype == DType::float16 ? 1e-3 : 1e-2;
}

void expect_close(const Batch& batch, const AttentionArgs& args) {
  const std::vector<double> expected = batch.expected(args);
  const std::vector<float> actual = batch.result();
  double worst = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double error = std::fabs(actual[i] - expected[i]) / std::max(1.0, std::fabs(expected[i]));
    if (!(error <= worst)) worst = error;
  }
  EXPECT_LT(worst, tolerance(batch.dtype));
}

class Attention : public ::testing::TestWithParam<std::tuple<Isa, DType>> {
 protected:
  [[nodiscard]] Isa isa() const { return std::get<0>(GetParam()); }
  [[nodiscard]] DType dtype() const { return std::get<1>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(All, Attention,
                         ::testing::Combine(::testing::ValuesIn(available_isas()),
                                            ::testing::Values(DType::float32, DType::float16,
                                                              DType::bfloat16)),
                         [](const auto& values) {
                           return std::string(to_string(std::get<0>(values.param))) + "_" +
                                  std::string(to_string(std::get<1>(values.param)));
                         });

TEST_P(Attention, AgreesWithTheReference) {
  Batch batch(dtype(), 6, 2, 72, 5, {1, 600, 0, 70}, {1, 3, 1, 70});
  for (const std::int64_t window : {0, 20}) {
    for (const double soft_cap : {0.0, 2.0}) {
      AttentionArgs args = batch.args();
      args.isa = isa();
      args.window = window;
      args.soft_cap = soft_cap;
      args.threads = 2;
      paged_attention(args);
      expect_close(batch, args);
    }
  }
}

TEST_P(Attention, AppendRoundsToNearestEven) {
  constexpr std::int64_t kDim = 64;
  constexpr std::int64_t kTokens = 64;
  std::vector<float> source(kTokens * kDim);
  std::mt19937 random(3);
  for (float& value : source) {
    // All magnitudes, below the smallest subnormal of float16 included, but within its range.
    value = std::ldexp(std::normal_distribution<float>()(random),
                       std::uniform_int_distribution<int>(-30, 12)(random));
  }
  source[0] = 65504.0f;
  source[1] = 65519.0f;
  source[2] = 0x1p-25f;
  source[3] = 0x1.8p-24f;
  source[4] = -0.0f;
  KVView kv;
  std::vector<std::byte> memory(2 * source.size() * size_of(dtype()));
  kv.base = memory.data();
  kv.dtype = dtype();
  kv.num_blocks = kTokens;
  kv.kv_heads = kv.block_size = 1;
  kv.head_dim = kv.kv_stride = kv.token_stride = kDim;
  kv.head_stride = kv.block_stride = 2 * kDim;
  const TokenView tokens{
      reinterpret_cast<std::byte*>(source.data()), DType::float32, kTokens, 1, kDim, kDim, kDim};
  std::vector<std::int64_t> slots;
  for (std::int64_t i = 0; i < kTokens; ++i) slots.push_back(kTokens - 1 - i);
  append(kv, tokens, tokens, slots, isa());
  for (std::int64_t i = 0; i < kTokens; ++i) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      std::byte expected[4];
      testing::from_float(dtype(), source[static_cast<std::size_t>(i * kDim + d)], expected);
      const std::int64_t at =
          ((kTokens - 1 - i) * 2 * kDim + d) * static_cast<std::int64_t>(size_of(dtype()));
      EXPECT_EQ(testing::to_float(dtype(), &memory[static_cast<std::size_t>(at)]),
                testing::to_float(dtype(), expected))
          << source[static_cast<std::size_t>(i * kDim + d)];
    }
  }
}

TEST(AttentionResidency, AsksForTheBlocksItTouchesAndForNoOthers) {
  Batch batch(DType::float32, 2, 1, 8, 4, {30, 5}, {2, 1});
  std::vector<std::int32_t> asked;
  AttentionArgs args = batch.args();
  args.window = 6;
  args.kv.require_resident = [&](std::span<const std::int32_t> blocks) {
    asked.insert(asked.end(), blocks.begin(), blocks.end());
  };
  paged_attention(args);
  // Positions 23 to 29 of the first sequence, 0 to 4 of the second.
  std::vector<std::int32_t> expected(batch.tables.begin() + 5, batch.tables.begin() + 8);
  expected.insert(expected.end(), batch.tables.begin() + batch.width,
                  batch.tables.begin() + batch.width + 2);
  EXPECT_EQ(asked, expected);
}

TEST(AttentionResidency, WritesNothingWhereABlockIsNotMapped) {
  Batch batch(DType::float32, 2, 1, 8, 4, {30, 0}, {2, 1});
  std::ranges::fill(batch.out, std::byte{0x55});
  AttentionArgs args = batch.args();
  args.kv.require_resident = [](std::span<const std::int32_t>) {
    throw Error(ErrorCode::not_resident, "block");
  };
  EXPECT_THROW(paged_attention(args), Error);
  EXPECT_THAT(batch.out, ::testing::Each(std::byte{0x55}));
}

TEST(Isas, NamesGoBothWays) {
  ASSERT_FALSE(available_isas().empty());
  EXPECT_EQ(available_isas().front(), Isa::portable);
  for (const Isa isa : available_isas()) EXPECT_EQ(isa_from_name(to_string(isa)), isa);
  const Isa last = available_isas().back();
  EXPECT_TRUE(best_isa() == last || (last == Isa::avx512_bf16 && best_isa() == Isa::avx512));
  EXPECT_THROW(static_cast<void>(isa_from_name("avx")), Error);
}

TEST(Isas, OneThatTheProcessorLacksIsRefused) {
  Batch batch(DType::float32, 2, 1, 8, 4, {30}, {2});
  AttentionArgs args = batch.args();
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    args.isa = isa;
    if (std::ranges::find(available_isas(), isa) != available_isas().end()) {
      EXPECT_NO_THROW(paged_attention(args));
    } else {
      EXPECT_THROW(paged_attention(args), Error);
    }
  }
}

}  // namespace
}  // namespace pipelive
