#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "pipelive/attention/attention.hpp"

// The parts of append and paged_attention between the public interface and the kernels. These files
// are compiled without special flags.
namespace pipelive::attention_detail {

/// The kernels of an ISA, the best one by default. Throws Error(invalid_argument) where this
/// processor or build lacks it.
[[nodiscard]] const Kernels& kernels_of(std::optional<Isa> isa);

/// Throws Error(invalid_argument, "<name> is <value>, expected <expected>").
[[noreturn]] void refuse(const std::string& name, const std::string& value,
                         const std::string& expected);

/// Half-open range of addresses that a view's elements lie in; empty for a view without elements.
struct AddressRange {
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
  [[nodiscard]] bool overlaps(const AddressRange& other) const noexcept {
    return begin < other.end && other.begin < end;
  }
};
[[nodiscard]] AddressRange range_of(const TokenView& view) noexcept;
[[nodiscard]] AddressRange range_of(const KVView& view) noexcept;

/// Throws where `view`'s shape or strides are out of range; `name` goes into the message.
void validate_tokens(const TokenView& view, const char* name, const KVView& kv);

/// Query rows of one sequence that are worked on together. A row is (query token, head of the
/// group), token-major: row = token * group + head.
struct RowTile {
  std::int64_t seq = 0;
  std::int64_t first_row = 0;
  int rows = 0;
  std::int64_t first_token = 0;  ///< row 0 of the sequence in `query`
  std::int64_t position = 0;     ///< of that row's token in the sequence
  std::int64_t kv_begin = 0;     ///< first position that a row attends to
  std::int64_t kv_end = 0;
  std::int64_t split_len = 0;  ///< splits are [i * split_len, (i + 1) * split_len)

  [[nodiscard]] std::int64_t first_split() const noexcept { return kv_begin / split_len; }
  [[nodiscard]] std::int64_t splits() const noexcept {
    return (kv_end - 1) / split_len - first_split() + 1;
  }
};

struct Plan {
  std::vector<RowTile> tiles;             ///< longest first
  std::vector<std::int64_t> zero_tokens;  ///< query tokens that attend to nothing
  std::vector<std::int32_t> blocks;       ///< physical blocks to be read
  std::int64_t group = 1;                 ///< query heads per KV head
  std::int64_t kv_bytes = 0;              ///< roughly what is read
  std::int64_t products = 0;              ///< query rows times tokens times head_dim
};

/// Tokens per split for a token at `position`; a function of nothing else.
[[nodiscard]] std::int64_t split_len_at(std::int64_t position) noexcept;

/// Checks all arguments and lays out the work; throws as paged_attention does.
[[nodiscard]] Plan make_plan(const AttentionArgs& args);

}  // namespace pipelive::attention_detail
