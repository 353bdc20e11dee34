// The attention kernels' own source, run on the CPU against a float64 reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "attention_cases.hpp"

namespace pipelive::cuda {
namespace {

using attention::emulator::Order;

double tolerance_of(DType dtype) {
  return dtype == DType::float32 ? 2e-5 : dtype == DType::float16 ? 1e-3 : 1e-2;
}

void check(const Problem& problem, Order order = Order::forward, int runs = 0, int stages = 0) {
  Batch batch(problem);
  ASSERT_EQ(batch.emulate(order, runs, stages), "");
  batch.reference();
  const DType query = problem.query_dtype.value_or(problem.dtype);
  EXPECT_LT(batch.error(), tolerance_of(query));
  EXPECT_LT(batch.lse_error(), query == DType::bfloat16 ? 1e-3 : 2e-5);
}

constexpr DType kTypes[] = {DType::float32, DType::float16, DType::bfloat16};

class KernelTest : public ::testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "threads on stacks of our own, which sanitizers do not know";
#endif
  }
};

TEST_F(KernelTest, DecodesWithAnyGroupSize) {
  for (const DType dtype : kTypes) {
    for (const int group : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 35}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + ", group " + std::to_string(group));
      Problem p;
      p.dtype = dtype;
      p.q_heads = 2 * group;
      p.seq_lens = {1, 33, 0, 130};
      p.query_lens = {1, 1, 1, 1};
      p.one_token_each = group % 2 == 0;
      check(p);
    }
  }
}

TEST_F(KernelTest, DecodesEveryHeadDim) {
  for (const DType dtype : kTypes) {
    for (const int dim : {8, 40, 64, 72, 80, 88, 96, 120, 128, 160, 192, 248, 256}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + ", head dim " + std::to_string(dim));
      Problem p;
      p.dtype = dtype;
      p.q_heads = 3;
      p.kv_heads = 1;
      p.head_dim = dim;
      p.block_size = 7;
      p.seq_lens = {90, 21};
      p.query_lens = {1, 14};  // 42 rows: more than one tile
      check(p);
    }
  }
}

TEST_F(KernelTest, EveryHeadDimWithFewRows) {
  for (const int dim : {64, 80, 96, 128, 192, 256}) {
    SCOPED_TRACE(dim);
    Problem p;
    p.head_dim = dim;
    p.seq_lens = {70, 20};
    p.query_lens = {1, 1};
    check(p);
  }
}

TEST_F(KernelTest, FoldsManySplitsInOneBlockOrInSeveral) {
  for (const DType dtype : kTypes) {
    for (const int runs : {1, 2, 3, 5, 40}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + ", runs " + std::to_string(runs));
      Problem p;
      p.dtype = dtype;
      p.kv_heads = 1;
      p.head_dim = 24;
      p.seq_lens = {2100, 513, 512, 3};
      p.query_lens = {3, 1, 1, 2};
      p.order = runs % 2 == 0 ? "nhd" : "split";
      check(p, Order::forward, runs);
    }
  }
}

TEST_F(KernelTest, AnyNumberOfStages) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const int stages : {1, 2, 3, 4}) {
      SCOPED_TRACE(std::to_string(stages));
      Problem p;
      p.dtype = dtype;
      p.kv_heads = 1;
      p.head_dim = 64;
      p.seq_lens = {700, 17};
      p.query_lens = {1, 9};
      check(p, Order::forward, 2, stages);
    }
  }
}

TEST_F(KernelTest, AnyOrderOfThreads) {
  for (const DType dtype : kTypes) {
    for (const Order order : {Order::backward, Order::random}) {
      Problem p;
      p.dtype = dtype;
      p.seq_lens = {1100, 30};
      p.query_lens = {12, 1};
      check(p, order, 1);
      check(p, order, 2);
    }
  }
}

TEST_F(KernelTest, AFloat32QueryOver16BitKV) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    Problem p;
    p.dtype = dtype;
    p.query_dtype = DType::float32;
    p.q_heads = 6;
    p.head_dim = 40;
    p.block_size = 8;
    p.seq_lens = {100, 7};
    p.query_lens = {20, 1};
    check(p);
  }
}

TEST_F(KernelTest, SoftCapOverLargeScores) {
  for (const double cap : {0.01, 1.0, 30.0, 1000.0}) {
    SCOPED_TRACE(cap);
    Problem p;
    p.dtype = DType::float32;
    p.soft_cap = cap;
    p.magnitude = 20;
    p.seq_lens = {300, 20};
    p.query_lens = {5, 20};
    check(p);
    p.dtype = DType::bfloat16;
    p.magnitude = 1;
    check(p);
  }
}

TEST_F(KernelTest, AWindowReadsNothingBeforeIt) {
  for (const DType dtype : kTypes) {
    for (const int window : {1, 2, 15, 16, 17, 33, 200, 600, 5000}) {
      for (const int runs : {1, 3}) {
        SCOPED_TRACE(std::string(to_string(dtype)) + ", window " + std::to_string(window));
        Problem p;
        p.dtype = dtype;
        p.head_dim = 16;
        p.kv_heads = 1;
        p.window = window;
        p.seq_lens = {1300, 40, 600};
        p.query_lens = {30, 1, 1};
        check(p, Order::forward, runs);
      }
    }
  }
}

TEST_F(KernelTest, BlockMapAndAnyBlockSize) {
  for (const int size : {1, 3, 16, 17, 64, 1000}) {
    SCOPED_TRACE(size);
    Problem p;
    p.block_size = size;
    p.block_map = size % 2 == 1;
    p.seq_lens = {100, 64, 5};
    p.query_lens = {40, 1, 0};
    p.trailing_tokens = 2;
    check(p);
  }
}

// A row's bits must not depend on the chunk it comes in, on the other sequences, on the number of
// runs or on the kernel that was chosen for the batch.
TEST_F(KernelTest, WithoutSequencesNothingIsReadAndEveryRowIsZero) {
  for (const DType dtype : kTypes) {
    Problem p;
    p.dtype = dtype;
    p.trailing_tokens = 7;
    Batch batch(p);
    // Not even the second of the starts is there, nor a length, nor a table.
    const std::vector<std::int32_t> starts{0};
    AttentionArgs& args = batch.args();
    args.num_seqs = 0;
    args.query_start = starts.data();
    args.seq_lens = nullptr;
    args.block_tables = nullptr;
    EXPECT_EQ(plan_attention(args, p.limits).grid, 0U);
    ASSERT_EQ(batch.emulate(), "");
    for (std::size_t i = 0; i < batch.out.size(); ++i) ASSERT_EQ(batch.out.get(i), 0.0f);
    for (const float lse : batch.lse) ASSERT_EQ(lse, -INFINITY);
  }
}

TEST_F(KernelTest, CompanyAndChunksChangeNothing) {
  for (const DType dtype : kTypes) {
    for (const int window : {0, 300}) {
      SCOPED_TRACE(std::string(to_string(dtype)) + ", window " + std::to_string(window));
      Problem p;
      p.dtype = dtype;
      p.kv_heads = 1;
      p.q_heads = 3;
      p.window = window;
      p.seq_lens = {1030, 50};
      p.query_lens = {14, 5};
      Batch chunk(p);
      ASSERT_EQ(chunk.emulate(Order::forward, 1), "");
      for (const int row : {0, 5, 13}) {
        // The row alone, as a decode step when the sequence was shorter.
        Batch alone(p);
        std::vector<std::int32_t> len{1030 - 14 + row + 1};
        AttentionArgs& args = alone.args();
        args.num_seqs = 1;
        args.seq_lens = len.data();
        args.query_start = nullptr;
        args.query.tokens = args.out.tokens = 1;
        const std::size_t begin = static_cast<std::size_t>(row) * 3 * 64;
        args.query.data += begin * size_of(dtype);
        args.out.data += begin * size_of(dtype);
        args.lse = alone.lse.data() + row * 3;
        ASSERT_EQ(alone.emulate(Order::random, 4), "");
        const auto bytes = std::size_t{3} * 64 * size_of(dtype);
        EXPECT_EQ(std::memcmp(args.out.data, chunk.out.data() + begin * size_of(dtype), bytes), 0);
        EXPECT_EQ(std::memcmp(args.lse, chunk.lse.data() + row * 3, 12), 0);
      }
    }
  }
}

TEST_F(KernelTest, SplitsThatGrowWithinATile) {
  // Rows on both sides of position 16384, where splits become longer.
  Problem p;
  p.kv_heads = 1;
  p.q_heads = 2;
  p.head_dim = 16;
  p.seq_lens = {16390};
  p.query_lens = {14};
  Batch direct(p);
  ASSERT_EQ(direct.emulate(Order::forward, 1), "");
  direct.reference();
  EXPECT_LT(direct.error(), 1e-2);
  EXPECT_LT(direct.lse_error(), 1e-3);
  Batch merged(p);
  ASSERT_EQ(merged.emulate(Order::forward, 5), "");
  EXPECT_EQ(std::memcmp(direct.out.data(), merged.out.data(), direct.out.bytes()), 0);
  EXPECT_EQ(direct.lse, merged.lse);
}

TEST_F(KernelTest, NumbersThatContradictEachOtherBecomeNaN) {
  for (const int runs : {1, 3}) {
    SCOPED_TRACE(runs);
    Problem p;
    p.dtype = DType::bfloat16;
    p.seq_lens = {40, 30, 20, 0};
    p.query_lens = {2, 2, 2, 2};
    p.trailing_tokens = 3;
    Batch batch(p);
    batch.reference();
    batch.lens[1] = 1;     // fewer than its query tokens
    batch.lens[2] = 1000;  // more than a row of the table holds
    ASSERT_EQ(batch.emulate(Order::forward, runs), "");
    constexpr std::size_t kRow = 4 * 64;
    for (std::size_t i = 0; i < batch.out.size(); ++i) {
      const std::size_t token = i / kRow;
      EXPECT_EQ(std::isnan(batch.out.get(i)), token >= 2 && token < 6) << i;
      if (token >= 6) {
        ASSERT_EQ(batch.out.get(i), 0.0f) << i;
      }
    }
    for (std::size_t i = 0; i < batch.lse.size(); ++i) {
      EXPECT_EQ(std::isnan(batch.lse[i]), i >= 8 && i < 24) << i;
      if (i >= 24) {
        EXPECT_EQ(batch.lse[i], -INFINITY) << i;
      }
    }
  }
}

TEST_F(KernelTest, WhatIsNotSharedLeavesAWarpPerTokenToFinish) {
  EXPECT_EQ(attention::finish_rows(7, 32, 1), 7);
  EXPECT_EQ(attention::finish_rows(7, 32, 2), 7 * 32);
  Problem p;
  p.seq_lens = {40, 30};
  p.query_lens = {5, 2};
  Batch batch(p);
  const AttentionLaunch launch = plan_attention(batch.args(), p.limits);
  ASSERT_EQ(launch.params.runs, 1);
  EXPECT_EQ(launch.finish_grid, 2U);
}

TEST_F(KernelTest, AnIdOutOfRangeMakesItsRowsNaNAndReadsNothing) {
  for (const DType dtype : kTypes) {
    Problem p;
    p.dtype = dtype;
    p.seq_lens = {40, 40};
    p.query_lens = {1, 1};
    Batch batch(p);
    batch.tables[1] = 1 << 30;
    ASSERT_EQ(batch.emulate(), "");
    for (std::size_t i = 0; i < batch.out.size(); ++i) {
      EXPECT_EQ(std::isnan(batch.out.get(i)), i < batch.out.size() / 2) << i;
    }
  }
}

// The poison of the other tests would be seen.
TEST_F(KernelTest, ANaNThatIsAttendedToShows) {
  Problem p;
  p.dtype = DType::float32;
  p.kv_heads = 1;
  p.q_heads = 5;
  p.head_dim = 16;
  p.block_size = 4;
  p.seq_lens = {50};
  p.query_lens = {20};
  for (const int side : {0, 1}) {
    Batch batch(p);
    batch.kv.set(batch.kv_index(batch.tables[35 / 4], 0, side, 35 % 4, 3), std::nanf(""));
    ASSERT_EQ(batch.emulate(), "");
    for (std::size_t token = 0; token < 20; ++token) {
      EXPECT_EQ(std::isnan(batch.out.get(token * 5 * 16 + 3)), token >= 5) << token;
    }
  }
}

}  // namespace
}  // namespace pipelive::cuda
