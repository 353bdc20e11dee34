#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace pipelive {

/// How the layers of a model lie in stacks and pages, and what they cost. A value.
///
/// Stack s holds the layers [s * stack, (s + 1) * stack) that the model has (the last stack may be
/// smaller). One block id of a stack is `block_bytes` times its layers, so blocks of any size may
/// straddle pages, and the ids [0, capacity) of a stack take a run of pages from its start.
struct Geometry {
  std::size_t block_bytes = 0;  ///< of one layer
  std::uint32_t num_layers = 0;
  std::uint32_t stack = 1;
  std::uint64_t max_blocks = 0;
  std::size_t page_bytes = 0;
  std::size_t extra_pages = 0;  ///< pages that the pool needs besides (the scratch page)

  /// Throws Error(invalid_argument) naming the field that is out of range.
  void validate() const;

  [[nodiscard]] std::uint32_t num_stacks() const noexcept {
    return (num_layers + stack - 1) / stack;
  }
  [[nodiscard]] std::uint32_t stack_of(std::uint32_t layer) const noexcept { return layer / stack; }
  [[nodiscard]] std::uint32_t first_layer(std::uint32_t stack_index) const noexcept {
    return stack_index * stack;
  }
  [[nodiscard]] std::uint32_t layers_in(std::uint32_t stack_index) const noexcept;
  /// Bytes from one block id to the next.
  [[nodiscard]] std::size_t stride(std::uint32_t stack_index) const noexcept {
    return block_bytes * layers_in(stack_index);
  }
  [[nodiscard]] std::size_t pages_for(std::uint32_t stack_index, std::uint64_t capacity) const;

  /// The stacks of `layers`, ascending. Throws Error(invalid_argument) for a layer that the model
  /// lacks or that is named twice and, with `whole`, for a stack that is only partly named: the
  /// message lists its layers. `argument` names the parameter.
  [[nodiscard]] std::vector<std::uint32_t> stacks_of(std::span<const std::uint32_t> layers,
                                                     const char* argument, bool whole) const;

  /// Bytes of physical memory for the ids [0, capacity) of `stacks`, in whole pages.
  [[nodiscard]] std::uint64_t bytes_needed(std::span<const std::uint32_t> stacks,
                                           std::uint64_t capacity) const;
  /// The largest capacity, at most max_blocks, that bytes_needed puts within `budget_bytes`; 0
  /// where not even one block fits. The exact inverse of bytes_needed.
  [[nodiscard]] std::uint64_t blocks_that_fit(std::span<const std::uint32_t> stacks,
                                              std::uint64_t budget_bytes) const;
};

/// "3, 4, 9 and 17 more": the first few of many numbers, for messages.
[[nodiscard]] std::string list_some(std::span<const std::uint64_t> numbers, std::size_t most = 8);

}  // namespace pipelive
