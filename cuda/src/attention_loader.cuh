#pragma once

#include "attention_device.cuh"
#include "pipelive/cuda/attention_plan.hpp"

namespace pipelive::cuda::attention {

/// One warp's stream of KV tiles into its stages of shared memory. A tile is `kTokens` tokens, K
/// and then V; tiles begin at multiples of kTokens and the warp takes every fourth. Block ids are
/// read two tiles ahead of the copies, so that a copy never waits for its address.
///
/// Only tokens in [begin, end) are touched, nor are their blocks looked up otherwise: rows of other
/// tokens become zeros. A block id out of range makes its token's row NaN, and touches nothing.
template <int kRowBytes, int kTokens>
class Loader {
 public:
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kCopies = kTokens * kChunks / 32;
  static_assert(kTokens * kChunks % 32 == 0, "all lanes copy the same number of chunks");
  static constexpr int kHalfBytes = kTokens * kRowBytes;

  /// `tile` is the warp's first.
  PIPELIVE_DEVICE Loader(const Params& p, int seq, int kv_head, int row_bytes, int tile, int begin,
                         int end)
      : p_(p),
        base_(p.kv + kv_head * p.head_stride),
        table_(p.tables + seq * p.table_stride),
        chunks_used_(row_bytes / 16),
        tile_(tile),
        begin_(begin),
        end_(end),
        lane_(thread_id() % 32) {
    // Divided once; from tile to tile the quotient and the rest only step on.
    const unsigned size = static_cast<unsigned>(p.block_size);
    constexpr unsigned kStep = kWarps * kTokens;
    step_blocks_ = static_cast<int>(kStep / size);
    step_tokens_ = static_cast<int>(kStep % size);
    const unsigned token = static_cast<unsigned>(tile * kTokens + lane_ % kTokens);
    index_ = static_cast<int>(token / size);
    offset_ = ahead_offset_ = static_cast<int>(token % size);
    block_ = resolve(look_up(tile));
    step();
    ahead_ = look_up(tile + kWarps);
  }

  /// Starts the next tile's copies into the stage at `stage` as one group; behind the last tile the
  /// group is empty.
  PIPELIVE_DEVICE void issue(unsigned stage) {
    if (static_cast<long long>(tile_) * kTokens < end_) {
      const int token = tile_ * kTokens + lane_ % kTokens;
      // The address of this lane's token; no address is negative.
      long long source = kSkip;
      if (token >= begin_ && token < end_) {
        source = kPoison;
        if (block_ >= 0 && block_ < p_.num_blocks) {
          source = reinterpret_cast<long long>(base_) + block_ * p_.block_stride +
                   offset_ * p_.token_stride;
        }
      }
      // Nearly all tiles are whole, and are copied without a look at each chunk.
      if (chunks_used_ == kChunks && !any_in_warp(source < 0)) {
        copy<true>(stage, source);
      } else {
        copy<false>(stage, source);
      }
    }
    cp_async_commit();
    tile_ += kWarps;
    offset_ += step_tokens_;
    if (offset_ >= p_.block_size) offset_ -= p_.block_size;
    block_ = resolve(ahead_);
    step();
    ahead_ = look_up(tile_ + kWarps);
  }

 private:
  static constexpr long long kSkip = -1;
  static constexpr long long kPoison = -2;

  template <bool kWhole>
  PIPELIVE_DEVICE void copy(unsigned stage, long long source) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * 32 + lane_;
      const int row = index / kChunks;
      const int chunk = index % kChunks;
      const long long from = shuffle(source, row);
      const unsigned to = stage + (row * kChunks + swizzle(chunk, row, kChunks)) * 16;
      if (kWhole || (from >= 0 && chunk < chunks_used_)) {
        const char* const key = reinterpret_cast<const char*>(from) + chunk * 16;
        cp_async(to, key);
        cp_async(to + kHalfBytes, key + p_.kv_stride);
      } else {
        // 0x7fff7fff is NaN as float16, bfloat16 and float32.
        const unsigned fill = from == kPoison ? 0x7fff7fffu : 0u;
        store_shared(to, {fill, fill, fill, fill});
        store_shared(to + kHalfBytes, {fill, fill, fill, fill});
      }
    }
  }

  /// Brings what is looked up ahead to the warp's next tile.
  PIPELIVE_DEVICE void step() {
    index_ += step_blocks_;
    ahead_offset_ += step_tokens_;
    if (ahead_offset_ >= p_.block_size) {
      ahead_offset_ -= p_.block_size;
      ++index_;
    }
  }
  PIPELIVE_DEVICE int look_up(int tile) const {
    const long long token = static_cast<long long>(tile) * kTokens + lane_ % kTokens;
    if (token < begin_ || token >= end_) return -1;
    return table_[index_];
  }
  PIPELIVE_DEVICE int resolve(int id) const {
    if (p_.block_map == nullptr) return id;
    return id >= 0 && id < p_.map_length ? p_.block_map[id] : -1;
  }

  const Params& p_;
  const char* const base_;
  const int* const table_;
  const int chunks_used_;
  int tile_;
  const int begin_;
  const int end_;
  const int lane_;
  int step_blocks_;  // from one tile to the next: whole blocks, and tokens beside them
  int step_tokens_;
  int offset_;  // of this lane's token of the next tile, in its block `block_`
  int block_;
  int index_;  // where in the table `ahead_` was, and the offset that goes with it
  int ahead_offset_;
  int ahead_;
};

}  // namespace pipelive::cuda::attention
