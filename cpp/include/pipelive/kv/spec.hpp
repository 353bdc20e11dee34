#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace pipelive {

enum class DType : std::uint8_t { float32, float16, bfloat16 };

[[nodiscard]] std::size_t size_of(DType dtype) noexcept;
[[nodiscard]] std::string_view to_string(DType dtype) noexcept;

/// The order of a block's dimensions in memory.
enum class BlockOrder : std::uint8_t {
  hnd,  ///< [kv_head, 2, token, dim]: one head's tokens lie side by side; the default
  nhd,  ///< [2, token, kv_head, dim]: one token's heads lie side by side
};

/// Where the bytes of a token lie inside one layer's block.
///
/// A token's state consists of *fragments*: runs of `fragment_bytes` contiguous bytes, one for each
/// (KV head, K or V). Fragment f of token t starts at `fragment_offsets[f] + t * token_stride`. The
/// order of the fragments is canonical (head-major, K before V) whatever the memory order, so it is
/// what the two ends of a transfer share. A latent cache (MLA) is one fragment.
struct BlockLayout {
  std::uint32_t block_size = 0;    ///< tokens per block
  std::size_t block_bytes = 0;     ///< bytes of one layer's block
  std::size_t fragment_bytes = 0;  ///< contiguous bytes of one token in one fragment
  std::size_t token_stride = 0;    ///< bytes from one token to the next inside a fragment
  std::vector<std::size_t> fragment_offsets;

  /// Bytes of one token's whole state in one layer, as it travels.
  [[nodiscard]] std::size_t slot_bytes() const noexcept {
    return fragment_bytes * fragment_offsets.size();
  }
  /// True where the tokens of a fragment are contiguous, so that n tokens are one copy.
  [[nodiscard]] bool tokens_contiguous() const noexcept { return token_stride == fragment_bytes; }
};

/// The shape of the KV state of every layer of a model.
struct KVSpec {
  std::uint32_t num_kv_heads = 0;
  std::uint32_t head_dim = 0;
  DType dtype = DType::bfloat16;
  std::uint32_t block_size = 16;
  BlockOrder order = BlockOrder::hnd;

  /// Throws Error(invalid_argument) naming the field that is out of range.
  void validate() const;
  [[nodiscard]] std::size_t block_bytes() const noexcept;
  [[nodiscard]] BlockLayout layout() const;
};

/// One layer's blocks as raw memory: block b starts at `base + b * block_stride`.
struct LayerMemory {
  std::byte* base = nullptr;
  std::size_t block_stride = 0;  ///< bytes; block_bytes times the layers of the stack
  std::uint64_t num_blocks = 0;  ///< the reserved maximum, not the capacity
};

}  // namespace pipelive
