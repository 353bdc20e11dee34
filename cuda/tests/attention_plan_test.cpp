#include "pipelive/cuda/attention_plan.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace pipelive::cuda::attention {
namespace {

TEST(PlanTest, SplitsCoverAPositionAndStayFew) {
  for (const int position : {0, 511, 512, 16383, 16384, 32767, 32768, 1 << 20, 0x7effffff}) {
    const int length = split_len_at(position);
    EXPECT_LT(position / length, kMaxSplits) << position;
    EXPECT_EQ(length % (kWarps * kTensorTile), 0);
    if (length > kSplitLen) {
      EXPECT_GE(position / (length / 2), kMaxSplits) << position;
    }
    EXPECT_LE(position / length + 1, most_splits(static_cast<long long>(position) + 1));
  }
}

TEST(PlanTest, RunsCoverAllSplitsOnceAndInOrder) {
  for (int runs = 1; runs <= 40; ++runs) {
    for (int splits = 1; splits <= 33; ++splits) {
      int next = 0;
      for (int run = 0; run < runs; ++run) {
        const SplitRange r = run_of(run, runs, splits);
        EXPECT_EQ(r.begin, next);
        EXPECT_GE(r.end, r.begin);
        next = r.end;
      }
      EXPECT_EQ(next, splits);
    }
  }
}

TEST(PlanTest, PassesCutATileWhereSplitsBecomeLonger) {
  // Group of 3; query tokens from position 16380 on; a tile of rows 6 to 38.
  Pass pass = pass_at(6, 38, 3, 16380, 0);
  EXPECT_EQ(pass.row_end, 12);  // token 3 is position 16383
  EXPECT_EQ(pass.first_position, 16382);
  EXPECT_EQ(pass.last_position, 16383);
  EXPECT_EQ(pass.split_len, 512);
  EXPECT_EQ(pass.num_splits, 32);
  pass = pass_at(pass.row_end, 38, 3, 16380, 100);
  EXPECT_EQ(pass.row_end, 38);
  EXPECT_EQ(pass.split_len, 1024);
  EXPECT_EQ(pass.kv_begin, 16384 - 99);
  EXPECT_EQ(pass.kv_end, 16380 + 37 / 3 + 1);
  EXPECT_EQ(pass.first_split, 15);
  EXPECT_EQ(pass.num_splits, 2);
}

TEST(PlanTest, EveryTileHasOneSlot) {
  for (const int group : {1, 3, 8, 13}) {
    for (const int rows : {8, 16, 32}) {
      const std::vector<int> counts{1, 0, 0, 70, 5, 1, 1, 33, 0, 2};
      std::vector<int> starts{0};
      std::vector<int> lens;
      for (const int n : counts) {
        starts.push_back(starts.back() + n);
        lens.push_back(n + 10);
      }
      Params p{};
      p.num_seqs = static_cast<int>(counts.size());
      p.tokens = starts.back() + 3;
      p.group = group;
      p.tile_rows = rows;
      p.query_start = starts.data();
      p.seq_lens = lens.data();
      p.table_width = 100;
      p.block_size = 16;
      std::set<std::pair<int, int>> seen;
      const auto slots = slots_for(p.num_seqs, p.tokens, group, rows, false);
      for (int slot = 0; slot < slots; ++slot) {
        Tile tile{};
        if (!tile_of(p, slot, &tile)) continue;
        EXPECT_LT(tile.row_begin, tile.row_end);
        for (int r = tile.row_begin; r < tile.row_end; ++r) {
          EXPECT_TRUE(seen.emplace(tile.seq, r).second) << slot;
        }
      }
      EXPECT_EQ(seen.size(), static_cast<std::size_t>(starts.back() * group));
      for (int token = 0; token < p.tokens; ++token) {
        const int seq = sequence_of_token(p, token);
        if (token >= starts.back()) {
          EXPECT_EQ(seq, -1);
        } else {
          ASSERT_GE(seq, 0);
          EXPECT_GE(token, starts[static_cast<std::size_t>(seq)]);
          EXPECT_LT(token, starts[static_cast<std::size_t>(seq) + 1]);
        }
      }
    }
  }
}

TEST(PlanTest, SequencesAreNotTrusted) {
  EXPECT_EQ(sequence_of(0, 1, 10, 4, 100).state, Sequence::kValid);
  EXPECT_EQ(sequence_of(0, 1, 0, 4, 100).state, Sequence::kEmpty);
  EXPECT_EQ(sequence_of(0, 0, 10, 4, 100).state, Sequence::kEmpty);
  EXPECT_EQ(sequence_of(3, 2, 10, 4, 100).state, Sequence::kInvalid);
  EXPECT_EQ(sequence_of(-1, 2, 10, 4, 100).state, Sequence::kInvalid);
  EXPECT_EQ(sequence_of(0, 2, 1, 4, 100).state, Sequence::kInvalid);
  EXPECT_EQ(sequence_of(0, 2, 101, 4, 100).state, Sequence::kInvalid);
  EXPECT_EQ(sequence_of(0, 2, -1, 4, 100).state, Sequence::kInvalid);
  EXPECT_EQ(sequence_of(0, 1, 0x7fffffff, 4, 1LL << 40).state, Sequence::kInvalid);
}

TEST(PlanTest, SwizzledChunksOfEightRowsLieInDifferentBanks) {
  for (int chunks = 1; chunks <= 64; ++chunks) {
    for (int row = 0; row < 16; row += 8) {
      for (int chunk = 0; chunk < chunks; ++chunk) {
        std::set<int> banks;
        for (int r = row; r < row + 8; ++r) {
          const int at = swizzle(chunk, r, chunks);
          EXPECT_LT(at, chunks);
          banks.insert((r * chunks + at) % 8);
        }
        EXPECT_EQ(banks.size(), 8U) << chunks;
      }
    }
    for (int r = 0; r < 16; ++r) {
      std::set<int> places;
      for (int chunk = 0; chunk < chunks; ++chunk) places.insert(swizzle(chunk, r, chunks));
      EXPECT_EQ(places.size(), static_cast<std::size_t>(chunks));
    }
  }
}

TEST(PlanTest, FoldsInAnyPartitionOfTheSameSplits) {
  // A part of nothing changes no bit; a first part comes out as it is.
  const Fold first = fold_of(minus_infinity(), 3.25f);
  EXPECT_EQ(first.total, 0.0f);
  EXPECT_EQ(first.part, 1.0f);
  const Fold nothing = fold_of(3.25f, minus_infinity());
  EXPECT_EQ(nothing.total, 1.0f);
  EXPECT_EQ(nothing.part, 0.0f);
  EXPECT_EQ(nothing.max, 3.25f);
  const Fold none = fold_of(minus_infinity(), minus_infinity());
  EXPECT_EQ(none.max, minus_infinity());
  EXPECT_EQ(none.total, 0.0f);
  const Fold both = fold_of(1.0f, 3.0f);
  EXPECT_EQ(both.max, 3.0f);
  EXPECT_EQ(both.total, 0.25f);
  EXPECT_EQ(both.part, 1.0f);
}

TEST(PlanTest, SharedMemoryIsLaidOutWithoutOverlap) {
  for (const bool tensor : {true, false}) {
    for (const int dim : {64, 80, 96, 128, 192, 256}) {
      for (const int rows : {8, 16, 32}) {
        for (int stages = 1; stages <= kMaxStages; ++stages) {
          const Shared s = shared_of(tensor, dim, rows, tensor ? 2 : 4, stages);
          EXPECT_EQ(s.stage_bytes % 128, 0);
          EXPECT_GE(s.query, kWarps * stages * s.stage_bytes);
          EXPECT_GE(s.part, s.query);
          EXPECT_EQ(s.total - s.part, rows * (dim + 4) * 4);
          EXPECT_EQ(s.stats - s.total, rows * (dim + 4) * 4);
          EXPECT_EQ(s.weights - s.stats, kNumStats * rows * 4);
          EXPECT_GE(s.bytes, s.weights);
          EXPECT_EQ(s.part % 16, 0);
          EXPECT_EQ(s.stride * 4 % 16, 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pipelive::cuda::attention
