#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "pipelive/kv/spec.hpp"

namespace pipelive {

/// One layer's KV as a strided tensor [block, kv_head, 2, token, head_dim] whose last dimension is
/// contiguous: keys at index 0 of the third dimension, values at 1. Strides are in elements and may
/// come in any order, so that both block orders and engines' own layouts are views of this kind.
/// The view borrows: the memory must outlive it.
struct KVView {
  std::byte* base = nullptr;
  DType dtype = DType::float32;
  std::int64_t num_blocks = 0;
  std::int64_t kv_heads = 0;
  std::int64_t block_size = 0;
  std::int64_t head_dim = 0;
  std::int64_t block_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t kv_stride = 0;
  std::int64_t token_stride = 0;
  /// Called with the physical blocks that an operation is going to touch, before it touches any;
  /// throws Error(not_resident) where one is not mapped. Empty: all blocks are mapped.
  std::function<void(std::span<const std::int32_t>)> require_resident;

  /// Throws Error(invalid_argument) naming the field of `kv` that is out of range. `written` asks
  /// moreover that no two elements share an address.
  void validate(bool written) const;
};

/// A strided tensor [token, head, head_dim] whose last dimension is contiguous; strides in
/// elements.
struct TokenView {
  std::byte* data = nullptr;
  DType dtype = DType::float32;
  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;

  [[nodiscard]] std::byte* at(std::int64_t token, std::int64_t head) const noexcept {
    return data +
           (token * token_stride + head * head_stride) * static_cast<std::int64_t>(size_of(dtype));
  }
};

}  // namespace pipelive
