#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "pipelive/base/slot_range.hpp"
#include "pipelive/kv/spec.hpp"

namespace pipelive {

/// The packed, canonical order of a slot range is what two ends with different memory layouts
/// share: block by block; in a block, fragment by fragment (head-major, K before V); in a fragment,
/// token by token; then the bytes of the token. A whole block of the default order is one plain
/// copy.
///
/// Neither function knows which blocks are mapped: the caller has checked the ranges against the
/// capacity, and holds it in place for the time of the call.

/// Slots in `ranges`. Throws Error(invalid_argument) where a range overflows or ends after
/// `num_slots`, naming it.
[[nodiscard]] std::uint64_t count_slots(std::span<const SlotRange> ranges, std::uint64_t num_slots);

/// Packs the slots of one layer into `out`, in the order given. Throws Error(invalid_argument)
/// where a range lies outside the layer, or `out` is not exactly as large as the slots.
void gather(const BlockLayout& layout, const LayerMemory& memory, std::span<const SlotRange> ranges,
            std::span<std::byte> out);

/// The inverse of gather: writes packed slots to their places. Same errors; nothing is written
/// then.
void scatter(const BlockLayout& layout, const LayerMemory& memory,
             std::span<const SlotRange> ranges, std::span<const std::byte> in);

/// As scatter for one packed range, but writes only the slots of `part`, which lies inside it. For
/// patches of which some slots have been overtaken; not tuned.
void scatter_part(const BlockLayout& layout, const LayerMemory& memory, SlotRange range,
                  std::span<const std::byte> in, SlotRange part);

/// As gather, and returns the CRC32C of what it packed, continued from `seed`. The sum runs over
/// pieces that are still in the cache, so it costs no second way through memory.
[[nodiscard]] std::uint32_t gather_crc(const BlockLayout& layout, const LayerMemory& memory,
                                       std::span<const SlotRange> ranges, std::span<std::byte> out,
                                       std::uint32_t seed);

/// CRC32C of what gather would pack, without a buffer of that size. Same errors as gather.
[[nodiscard]] std::uint32_t digest(const BlockLayout& layout, const LayerMemory& memory,
                                   std::span<const SlotRange> ranges, std::uint32_t seed = 0);

}  // namespace pipelive
