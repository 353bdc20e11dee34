#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "attention/attention_reference.hpp"
#include "attention/bf16_pairs_kernel.hpp"
#include "pipelive/attention/isa.hpp"

namespace pipelive {
namespace {

using attention_detail::SplitArgs;

class Bf16Pairs : public ::testing::TestWithParam<std::int64_t> {};
INSTANTIATE_TEST_SUITE_P(HeadDims, Bf16Pairs,
                         ::testing::Values(8, 16, 24, 32, 40, 64, 72, 96, 128, 200, 256));

TEST_P(Bf16Pairs, AgreeWithTheReference) {
  const attention_detail::Kernels* const kernels = testing::emulated_bf16_kernels();
  if (kernels == nullptr || best_isa() < Isa::avx512) GTEST_SKIP() << "needs AVX-512";
  const auto dim = static_cast<int>(GetParam());
  constexpr int kRows = 7;
  // One head; row r is position 70 + r, the split starts at 3 and the window is of 40 tokens.
  for (const int window : {1000, 40}) {
    testing::Batch batch(DType::bfloat16, 1, 1, dim, 5, {77}, {kRows});
    const AttentionArgs args = batch.args();
    const int stride =
        (dim + attention_detail::kPad - 1) / attention_detail::kPad * attention_detail::kPad;
    std::vector<float> scratch(16384), acc(static_cast<std::size_t>(kRows * stride)), max(kRows),
        sum(kRows);
    std::vector<std::uint16_t> query(kRows * attention_detail::kMaxHeadDim, 0);
    std::vector<std::int32_t> begin(kRows), end(kRows);
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(&query[static_cast<std::size_t>(r) * attention_detail::kMaxHeadDim],
                  &batch.query[static_cast<std::size_t>(r * dim * 2)],
                  static_cast<std::size_t>(dim) * 2);
      end[static_cast<std::size_t>(r)] = 71 + r;
      begin[static_cast<std::size_t>(r)] = std::max(3, 71 + r - window);
    }
    SplitArgs split{};
    split.base = reinterpret_cast<const unsigned char*>(batch.kv.data());
    split.block_bytes = args.kv.block_stride * 2;
    split.token_bytes = args.kv.token_stride * 2;
    split.value_offset = args.kv.kv_stride * 2;
    split.blocks = batch.tables.data();
    split.block_size = 5;
    split.head_dim = dim;
    split.rows = kRows;
    split.row_begin = begin.data();
    split.row_end = end.data();
    split.kv_begin = begin.front();
    split.kv_end = split.prefetch_end = end.back();
    split.score_scale = 1.4426950408889634f / std::sqrt(static_cast<float>(dim));
    split.query_bf16 = query.data();
    split.acc = acc.data();
    split.max = max.data();
    split.sum = sum.data();
    split.scratch = scratch.data();
    kernels->attend[static_cast<int>(DType::bfloat16)](split);

    for (int r = 0; r < kRows; ++r) {
      std::vector<double> weights;
      double total = 0;
      for (int k = begin[static_cast<std::size_t>(r)]; k < end[static_cast<std::size_t>(r)]; ++k) {
        double dot = 0;
        for (int d = 0; d < dim; ++d) {
          dot += testing::to_float(DType::bfloat16,
                                   &batch.query[static_cast<std::size_t>((r * dim + d) * 2)]) *
                 batch.kv_at(0, k, 0, 0, d);
        }
        weights.push_back(std::exp(dot / std::sqrt(dim)));
        total += weights.back();
      }
      const auto row = static_cast<std::size_t>(r);
      EXPECT_NEAR(max[row] * std::log(2.0) + std::log(sum[row]), std::log(total), 1e-4);
      for (int d = 0; d < dim; ++d) {
        double expected = 0;
        for (std::size_t k = 0; k < weights.size(); ++k) {
          expected += weights[k] / total *
                      batch.kv_at(0, begin[row] + static_cast<std::int64_t>(k), 0, 1, d);
        }
        EXPECT_NEAR(acc[static_cast<std::size_t>(r * stride + d)] / sum[row], expected, 5e-3);
      }
    }
  }
}

}  // namespace
}  // namespace pipelive
