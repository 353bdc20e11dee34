#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pipelive/base/slot_range.hpp"

// Arithmetic on sets of slots that are written as ranges. A *normal* list is sorted, its ranges are
// not empty, and no two of them overlap or touch.
namespace pipelive {

/// The normal list of the same slots. Throws Error(invalid_argument) where begin + count passes
/// 2^64.
[[nodiscard]] std::vector<SlotRange> merge_ranges(std::span<const SlotRange> ranges);

/// The slots of the blocks `ids` (any order, repeats allowed), as a normal list. Throws
/// Error(invalid_argument) for a negative id or a block size of 0.
[[nodiscard]] std::vector<SlotRange> ranges_of_blocks(std::span<const std::int64_t> ids,
                                                      std::uint32_t block_size);

/// The slots that are in both lists, as a normal list. Throws Error(invalid_argument) where a list
/// is not normal.
[[nodiscard]] std::vector<SlotRange> intersect_ranges(std::span<const SlotRange> a,
                                                      std::span<const SlotRange> b);

/// The ids of the blocks that hold any of the slots, ascending, each once. Throws
/// Error(invalid_argument) where `ranges` is not normal or the block size is 0.
[[nodiscard]] std::vector<std::int64_t> blocks_touched(std::span<const SlotRange> ranges,
                                                       std::uint32_t block_size);

/// The number of slots in a normal list.
[[nodiscard]] std::uint64_t count_slots(std::span<const SlotRange> ranges) noexcept;

}  // namespace pipelive
