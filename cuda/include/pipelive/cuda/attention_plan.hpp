#pragma once

// How paged attention on a GPU is cut into pieces, and how the pieces are put together: index
// arithmetic that the kernels, the launcher and the tests share. No standard header is included, so
// that NVRTC can compile it.

#include "pipelive/cuda/portable.hpp"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace pipelive::cuda::attention {

/// Warps of a thread block; each reads every fourth tile of tokens into shared memory of its own.
inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
/// Tokens of one warp's tile: in the tensor core kernels, and in those for float32 queries.
inline constexpr int kTensorTile = 16;
inline constexpr int kScalarTile = 8;
/// A sequence's KV is cut every kSplitLen tokens; where that would give more than kMaxSplits
/// pieces, they become longer. Both are fixed: results depend on where the cuts are.
inline constexpr int kSplitLen = 512;
inline constexpr int kMaxSplits = 32;
inline constexpr int kMaxStages = 4;
inline constexpr int kMaxHeadDim = 256;

/// What every kernel takes, by value. Strides of KV are in bytes, of query and out in elements.
/// All pointers are addresses of the device.
struct Params {
  const void* query;       // [tokens, q_heads, head_dim]
  const char* kv;          // key of token 0 of block 0 and head 0
  void* out;               // like query
  float* lse;              // [tokens, q_heads], or null
  const int* tables;       // [num_seqs, table_width]
  const int* seq_lens;     // [num_seqs]
  const int* query_start;  // [num_seqs + 1], or null: one token each
  const int* block_map;    // [map_length], or null
  float* partial;          // [splits][tokens * q_heads][head_dim], where runs > 1
  float* partial_stats;    // [splits][tokens * q_heads][2]: base-2 maximum, sum
  long long query_token_stride;
  long long query_head_stride;
  long long out_token_stride;
  long long out_head_stride;
  long long block_stride;
  long long head_stride;
  long long kv_stride;
  long long token_stride;
  long long table_stride;  // elements
  int num_seqs;
  int tokens;
  int q_heads;
  int group;  // query heads per KV head
  int head_dim;
  int block_size;
  int num_blocks;
  int table_width;
  int map_length;
  int window;         // 0: none
  float score_scale;  // without a cap: scale * log2(e); with one: scale / cap
  float cap_scale;    // cap * log2(e), or 0 for no cap
  int tile_rows;      // query rows per thread block
  int slots;          // tiles of rows at most, see slot_of
  int runs;           // thread blocks that share one tile's splits
  int stages;         // of the copy pipeline, 1 to kMaxStages
  int query_aligned;  // whether query rows may be read in words of 4 bytes
  int out_aligned;    // the same of out, or of 16 bytes where it is float32
};
static_assert(sizeof(Params) == 19 * 8 + 18 * 4, "host and device must agree on every offset");

/// What the kernel that checks tables takes.
struct CheckParams {
  Params params;
  unsigned long long* report;  // see cuda::check_tables
  int resident;
};

/// A float32 power of two; what is rounded off is the same in every kernel.
PIPELIVE_HD float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(__CUDACC__)
  return x;  // never run: only the device half of a .cu file is kept
#else
  return std::exp2(x);
#endif
}

PIPELIVE_HD float minus_infinity() {
#if defined(__CUDA_ARCH__)
  return __int_as_float(static_cast<int>(0xff800000u));  // the quotient is computed at run time
#else
  return -1.0f / 0.0f;
#endif
}

/// To subtract from scores: the maximum, or 0 where nothing was attended to.
PIPELIVE_HD float finite_max(float max) {
  return max == minus_infinity() ? 0.0f : max;
}

/// The weights with which a total and the part that follows it are added up.
struct Fold {
  float max;
  float total;
  float part;
};
PIPELIVE_HD Fold fold_of(float total_max, float part_max) {
  Fold fold;
  fold.max = part_max > total_max ? part_max : total_max;
  const float base = finite_max(fold.max);
  fold.total = exp2_fast(total_max - base);
  fold.part = exp2_fast(part_max - base);
  return fold;
}

/// The length of the splits of a sequence for a query at that position.
PIPELIVE_HD int split_len_at(int position) {
  int length = kSplitLen;
  while (position / kMaxSplits >= length) length *= 2;
  return length;
}

/// How many splits a sequence of that many tokens can have at most, whatever its length up to
/// there.
PIPELIVE_HD int most_splits(long long tokens) {
  const long long splits = (tokens + kSplitLen - 1) / kSplitLen;
  return splits < kMaxSplits ? static_cast<int>(splits) : kMaxSplits;
}

/// Neighbouring query rows of a tile that have one split length, and the KV that they attend to.
/// Row r of a sequence is query token r / group and head r % group of the KV head's group.
struct Pass {
  int row_begin;
  int row_end;
  int first_position;  // of the first row; it attends to first_position + 1 tokens
  int last_position;
  int split_len;
  int kv_begin;
  int kv_end;
  int first_split;
  int num_splits;
};
/// The pass that begins at `row`, of a tile that ends before `tile_end`; `position` is that of the
/// sequence's first query token.
PIPELIVE_HD Pass pass_at(int row, int tile_end, int group, int position, int window) {
  Pass pass;
  pass.row_begin = row;
  pass.first_position = position + row / group;
  pass.split_len = split_len_at(pass.first_position);
  const long long longer = static_cast<long long>(pass.split_len) * kMaxSplits;
  const long long end = (longer - position) * group;
  pass.row_end = end < tile_end ? static_cast<int>(end) : tile_end;
  pass.last_position = position + (pass.row_end - 1) / group;
  const int begin = window > 0 ? pass.first_position - window + 1 : 0;
  pass.kv_begin = begin > 0 ? begin : 0;
  pass.kv_end = pass.last_position + 1;
  pass.first_split = pass.kv_begin / pass.split_len;
  pass.num_splits = pass.last_position / pass.split_len - pass.first_split + 1;
  return pass;
}

/// The splits [begin, end) of `num_splits` that run number `run` of `runs` takes.
struct SplitRange {
  int begin;
  int end;
};
PIPELIVE_HD SplitRange run_of(int run, int runs, int num_splits) {
  SplitRange result;
  // There are few of either.
  result.begin = run * num_splits / runs;
  result.end = (run + 1) * num_splits / runs;
  return result;
}

/// Whether a tile's result goes straight to the output; else its splits are merged afterwards.
PIPELIVE_HD bool is_direct(int runs, int num_splits) {
  return runs == 1 || num_splits == 1;
}

/// The warps that `finish` takes: one for each row; where no tile's splits are shared, nothing but
/// rows that nobody wrote is left to it, and a warp looks after all heads of a token.
PIPELIVE_HD long long finish_rows(int tokens, int q_heads, int runs) {
  return runs == 1 ? tokens : static_cast<long long>(tokens) * q_heads;
}

/// Tiles of rows have fixed slots, so that the grid does not depend on what is on the device:
/// sequence `seq`, whose query begins at token `start`, has the slots from here on. No two
/// sequences share one.
PIPELIVE_HD int slot_of(int seq, int start, int group, int tile_rows) {
  return static_cast<int>(static_cast<unsigned>(start) * static_cast<unsigned>(group) /
                          static_cast<unsigned>(tile_rows)) +
         seq;
}
/// How many slots cover `tokens` query tokens of `num_seqs` sequences.
PIPELIVE_HD long long slots_for(int num_seqs, int tokens, int group, int tile_rows,
                                bool one_token_each) {
  if (one_token_each) {
    return static_cast<long long>(num_seqs) * ((group + tile_rows - 1) / tile_rows);
  }
  return static_cast<long long>(tokens) * group / tile_rows + num_seqs;
}

/// A sequence's share of the batch, read from the device and not trusted.
struct Sequence {
  int start;  // first query token
  int count;  // of query tokens
  int len;    // tokens of KV, query tokens included
  enum State { kEmpty, kValid, kInvalid } state;
};
PIPELIVE_HD Sequence sequence_of(int start, int count, int len, int tokens, long long capacity) {
  Sequence seq;
  seq.start = start;
  seq.count = count;
  seq.len = len;
  // Near the largest int, positions of a tile's end would wrap.
  constexpr long long kLongest = 0x7f000000;
  if (capacity > kLongest) capacity = kLongest;
  const bool inside = start >= 0 && count >= 0 && start <= tokens && count <= tokens - start;
  if (!inside || len < 0 || len > capacity || (len > 0 && count > len)) {
    seq.state = Sequence::kInvalid;
  } else {
    seq.state = len == 0 || count == 0 ? Sequence::kEmpty : Sequence::kValid;
  }
  return seq;
}
PIPELIVE_HD Sequence read_sequence(const Params& p, int seq) {
  const int start = p.query_start == nullptr ? seq : p.query_start[seq];
  const int end = p.query_start == nullptr ? seq + 1 : p.query_start[seq + 1];
  return sequence_of(start, end < start ? -1 : end - start, p.seq_lens[seq], p.tokens,
                     static_cast<long long>(p.table_width) * p.block_size);
}

/// The tile of rows [row_begin, row_end) of a sequence.
struct Tile {
  int seq;
  int row_begin;
  int row_end;
  Sequence sequence;
};
/// The tile in a slot. Returns false where the slot is empty or its sequence cannot be computed.
PIPELIVE_HD bool tile_of(const Params& p, int slot, Tile* tile) {
  int index;
  if (p.query_start == nullptr) {
    const int tiles = (p.group + p.tile_rows - 1) / p.tile_rows;
    tile->seq = slot / tiles;
    index = slot % tiles;
  } else {
    // The last sequence whose slots begin at or before this one.
    int low = 0;
    int high = p.num_seqs;
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      if (slot_of(middle, p.query_start[middle], p.group, p.tile_rows) <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
    tile->seq = low;
    index = slot - slot_of(low, p.query_start[low], p.group, p.tile_rows);
  }
  tile->sequence = read_sequence(p, tile->seq);
  if (index < 0 || tile->sequence.state != Sequence::kValid) return false;
  const int rows = tile->sequence.count * p.group;
  const long long begin = static_cast<long long>(index) * p.tile_rows;
  if (begin >= rows) return false;
  tile->row_begin = static_cast<int>(begin);
  tile->row_end = rows - tile->row_begin < p.tile_rows ? rows : tile->row_begin + p.tile_rows;
  return true;
}

/// The sequence that a query token belongs to, or -1 where it lies behind the last.
PIPELIVE_HD int sequence_of_token(const Params& p, int token) {
  if (p.query_start == nullptr) return token < p.num_seqs ? token : -1;
  if (p.num_seqs == 0 || token >= p.query_start[p.num_seqs]) return -1;
  int low = 0;
  int high = p.num_seqs;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (p.query_start[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Rows of KV lie in shared memory without gaps, in chunks of 16 bytes, and the chunks of a row are
/// permuted so that the same chunk of eight neighbouring rows lies in eight different groups of
/// banks.
PIPELIVE_HD constexpr int swizzle(int chunk, int row, int chunks) {
  return chunks % 8 == 0   ? chunk ^ (row & 7)
         : chunks % 4 == 0 ? chunk ^ ((row >> 1) & 3)
         : chunks % 2 == 0 ? chunk ^ ((row >> 2) & 1)
                           : chunk;
}

/// Where things lie in a thread block's shared memory, in bytes from its start.
struct Shared {
  int stage_bytes;  // one warp's tile of K, then of V
  int query;
  int query_stride;  // elements
  int part;          // [rows][stride] floats: a split's result
  int total;         // the same: of the splits so far
  int stride;        // elements
  int stats;         // float arrays of `rows` each, see Stat
  int weights;       // one warp's scratch after the other, in the kernels for float32 queries
  int bytes;
};
enum Stat {
  kWarpMax = 0,
  kWarpSum = kWarpMax + kWarps,
  kPartMax = kWarpSum + kWarps,
  kPartSum,
  kFoldTotal,
  kFoldPart,
  kTotalMax,
  kTotalSum,
  kRowEnd,  // as int: one past the last position that the row attends to; 0: no row
  kNumStats
};
/// `dim` is the head dim that the kernel is made for, `item` the bytes of an element of KV.
PIPELIVE_HD constexpr Shared shared_of(bool tensor, int dim, int rows, int item, int stages) {
  Shared s{};
  s.stage_bytes = 2 * (tensor ? kTensorTile : kScalarTile) * dim * item;
  s.query = kWarps * stages * s.stage_bytes;
  s.query_stride = tensor ? dim : dim + 4;
  // The tensor core kernel for one tile of eight rows keeps its query in registers.
  const int query_bytes = tensor ? (rows == 8 ? 0 : rows * dim * item) : rows * (dim + 4) * 4;
  s.part = s.query + query_bytes;
  s.stride = dim + 4;
  s.total = s.part + rows * s.stride * 4;
  s.stats = s.total + rows * s.stride * 4;
  s.weights = s.stats + kNumStats * rows * 4;
  s.bytes = s.weights + (tensor ? 0 : kWarps * (kScalarTile + 1) * rows * 4);
  return s;
}

}  // namespace pipelive::cuda::attention
