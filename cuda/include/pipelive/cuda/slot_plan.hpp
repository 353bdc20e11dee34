#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "pipelive/cuda/slot_math.hpp"
#include "pipelive/transport/slot_copier.hpp"

namespace pipelive::cuda {

/// How the packed bytes of one call are moved: the tables for the kernel, and what the copy engine
/// does instead.
struct SlotPlan {
  /// Packed bytes [begin, end), all of them either for the kernel or one run for the copy engine.
  struct Part {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    std::uint64_t address = 0;  ///< of the run's first byte; 0: the kernel's
    std::uint64_t row = 0;      ///< bytes that are contiguous in memory
    std::uint64_t pitch = 0;    ///< bytes in memory from one row to the next
  };

  SlotShape shape{};
  std::vector<SlotLayer> layers;
  std::vector<u64> offsets;
  std::vector<SlotRecord> records;
  std::vector<Part> parts;  ///< in the packed order, without gaps
  std::uint64_t bytes = 0;  ///< packed, all together

  [[nodiscard]] std::size_t table_bytes() const noexcept;
  /// Writes the tables to `host`, which will be copied to `device`; both are aligned to 16 bytes.
  [[nodiscard]] SlotTable write_tables(std::byte* host, std::uint64_t device) const;
};

/// Lays out a call. `direct_bytes` is the length from which on a run of whole blocks goes by the
/// copy engine: contiguous ones and, with `strided`, those whose rows are long as well.
/// `packed_alignment` is that of the packed bytes' address.
///
/// Throws Error(invalid_argument) where a range lies outside its layer, where layers differ in
/// their slots' shape, or where one block takes 1 GiB or more.
[[nodiscard]] SlotPlan plan_slots(std::span<const LayerSlots> slots, std::size_t direct_bytes,
                                  bool strided, std::uint64_t packed_alignment);
/// The same for scatter_part: of `range`, only the slots of `part`.
[[nodiscard]] SlotPlan plan_slots_part(const LayerSlots& slots, SlotRange part,
                                       std::uint64_t packed_alignment);

/// One copy of a part's bytes [begin, end): `rows` rows of `row` bytes.
struct DirectCopy {
  std::uint64_t packed = 0;   ///< first byte, in the packed order
  std::uint64_t address = 0;  ///< first byte in memory
  std::uint64_t row = 0;
  std::uint64_t rows = 1;
  std::uint64_t pitch = 0;
};
/// The copies for the packed bytes [begin, end) of a part that the copy engine moves: four at
/// most. No row's pitch runs past the end of the last row.
[[nodiscard]] std::vector<DirectCopy> direct_copies(const SlotPlan::Part& part, std::uint64_t begin,
                                                    std::uint64_t end);

}  // namespace pipelive::cuda
