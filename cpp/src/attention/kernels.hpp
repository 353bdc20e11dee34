#pragma once

#include <cstdint>

// What the dispatcher shares with the kernels. Every kernel file is compiled with flags of its own
// (isa.cmake), so nothing here may be an inline function: the linker keeps one copy of an inline
// function, and it could be the one with instructions that this processor lacks.
namespace pipelive::attention_detail {

/// Tokens that the online softmax takes at a time; tiles start at multiples of it.
inline constexpr int kTile = 32;
/// Rows of float scratch are padded with zeros to a multiple of this.
inline constexpr int kPad = 32;
inline constexpr int kMaxHeadDim = 256;
/// Query rows that one call of a kernel takes at most.
inline constexpr int kMaxRows = 64;

/// One split of one sequence's KV for one KV head and a few query rows.
struct SplitArgs {
  const unsigned char* base;      ///< key of token 0 in block 0 of this KV head
  std::int64_t block_bytes;       ///< from one block to the next
  std::int64_t token_bytes;       ///< from one token of a block to the next
  std::int64_t value_offset;      ///< from a token's key to its value
  const std::int32_t* blocks;     ///< the sequence's row of the block table
  const std::int32_t* block_map;  ///< block id to physical block, or null
  int block_size;
  int head_dim;
  int rows;
  const std::int32_t* row_begin;    ///< first position that each row attends to; ascending
  const std::int32_t* row_end;      ///< one past the last; ascending
  int kv_begin;                     ///< first position of this split that any row attends to
  int kv_end;                       ///< one past the last
  int prefetch_end;                 ///< positions below may be prefetched
  float score_scale;                ///< without a cap: scale * log2(e); with one: scale / cap
  float cap_scale;                  ///< cap * log2(e), or 0 for no cap
  const float* query;               ///< [rows, padded head_dim], zero padded
  const std::uint16_t* query_bf16;  ///< [rows, kMaxHeadDim], zero padded, or null
  float* acc;                       ///< out [rows, padded head_dim]: sum of p * v
  float* max;                       ///< out [rows]: base-2 maximum, -inf where nothing was attended
  float* sum;                       ///< out [rows]: sum of p
  float* scratch;                   ///< scratch_floats(rows) floats, aligned to 64 bytes
};

/// The kernels of one ISA. Arrays are indexed by DType.
struct Kernels {
  void (*attend[3])(const SplitArgs& args);
  /// Adds a later split's partial result to `acc`, `max`, `sum`, for `rows` rows of `stride`
  /// floats.
  void (*fold)(int rows, int stride, float* acc, float* max, float* sum, const float* part_acc,
               const float* part_max, const float* part_sum);
  /// `count` (a multiple of 8) elements to float, then zeros up to `padded` (a multiple of 16).
  void (*widen[3])(const void* from, float* to, int count, int padded);
  /// `count` (a multiple of 8) floats times `factor`, rounded to the dtype.
  void (*narrow[3])(const float* from, float factor, void* to, int count);
  bool wants_bf16_query;
};

/// Null where the compiler or the architecture cannot have the ISA.
const Kernels* portable_kernels() noexcept;
const Kernels* avx2_kernels() noexcept;
const Kernels* avx512_kernels() noexcept;
const Kernels* avx512_bf16_kernels() noexcept;

}  // namespace pipelive::attention_detail
