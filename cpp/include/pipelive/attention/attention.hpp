#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "pipelive/attention/isa.hpp"
#include "pipelive/attention/kv_view.hpp"

namespace pipelive {

/// Writes the keys and values of tokens to their slots: token i goes to slot `slots[i]`, which is
/// block_id * block_size + offset; -1 skips the token. `key` and `value` have the dtype of `kv` or
/// float32, which is rounded to nearest even. Of two tokens with one slot the later stays.
///
/// Throws Error(invalid_argument) where shapes do not agree, a slot lies outside of `kv`, or `key`
/// or `value` overlaps `kv`; Error(not_resident) where a slot's block is not mapped. Nothing is
/// written then.
void append(const KVView& kv, const TokenView& key, const TokenView& value,
            std::span<const std::int64_t> slots, std::optional<Isa> isa = std::nullopt);

/// What paged_attention reads and writes. Sequences come one after the other in `query`; the query
/// tokens of a sequence are the last of its `seq_lens[i]` tokens, whose KV is in place already.
struct AttentionArgs {
  TokenView query;  ///< [tokens, q_heads, head_dim]; dtype of the KV, or float32
  KVView kv;
  TokenView out;         ///< shape and dtype of `query`; may be the same memory
  float* lse = nullptr;  ///< [tokens, q_heads], contiguous, natural logarithm; null: not wanted
  std::int64_t num_seqs = 0;
  const std::int32_t* block_tables = nullptr;  ///< [num_seqs, table_width] of block ids
  std::int64_t table_width = 0;
  std::int64_t table_stride = 0;              ///< elements from one sequence to the next
  const std::int32_t* seq_lens = nullptr;     ///< [num_seqs], new tokens included
  const std::int32_t* query_start = nullptr;  ///< [num_seqs + 1], from 0; null: one token each
  std::span<const std::int32_t> block_map;    ///< block id to physical block; empty: the identity
  double scale = 1.0;                         ///< of the scores
  std::int64_t window = 0;  ///< a token attends to itself and window - 1 before it; 0: to all
  double soft_cap = 0.0;    ///< scores become cap * tanh(score / cap); 0: they do not
  unsigned threads = 0;     ///< at most; 0: as many as the process may use
  std::optional<Isa> isa;
};

/// Causal attention over paged KV. Query heads are grouped evenly over the KV heads. Rows of an
/// empty sequence, and rows behind the last sequence, become 0 with a log-sum-exp of -infinity.
///
/// A token's result depends bit for bit on its own query, on the KV that it attends to and on its
/// position alone: not on the number of threads, the other sequences, the chunk it comes in, block
/// ids or the memory order of the KV.
///
/// Reads only blocks that hold tokens some row attends to; the rest of a table's row may hold
/// anything. Throws Error(invalid_argument) naming the argument where shapes, lengths, ids or
/// numbers are out of range or `out` overlaps an input, Error(not_resident) where a block to be
/// read is not mapped; nothing is written then.
void paged_attention(const AttentionArgs& args);

/// What paged_attention checks without looking into tables, lengths or any other memory, so that
/// all pointers but null may be another device's. Throws Error(invalid_argument).
void validate_layout(const AttentionArgs& args);

/// Everything that paged_attention checks. Reads `block_tables`, `seq_lens`, `query_start` and
/// `block_map`, but neither query, out nor KV.
void validate(const AttentionArgs& args);

}  // namespace pipelive
