#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pipelive/base/slot_range.hpp"
#include "pipelive/tracker/slot_bitmap.hpp"

namespace pipelive {

/// The slots that one writer (a step, or a writer outside the steps) reports, packed as runs of
/// neighbouring slots at 8 bytes a run. A log whose runs would take more memory than a bitmap of
/// all slots turns into one, so a log never holds more than two bitmaps. Not thread-safe.
///
/// Every add_... is all or nothing: on Error(invalid_argument), which names the element by index
/// and value, and on std::bad_alloc the log is as before. `caller` is what the message begins with.
class WriteLog {
 public:
  /// Slot numbers are packed with run lengths into 64 bits.
  static constexpr std::uint64_t kMaxSlots = std::uint64_t{1} << 36;

  explicit WriteLog(std::uint64_t num_slots) : num_slots_(num_slots) {}

  /// Slots in any order, repeats allowed; -1 marks a padded row and is skipped.
  void add_slots(const char* caller, std::span<const std::int64_t> slots);
  /// Ranges in any order; empty ones are skipped.
  void add_ranges(const char* caller, std::span<const SlotRange> ranges);
  /// All slots of the blocks `ids`.
  void add_blocks(const char* caller, std::span<const std::int64_t> ids, std::uint32_t block_size);

  /// Marks the log's slots in `marks`; returns how many were not marked.
  std::uint64_t fold_into(SlotBitmap& marks) const noexcept;

  /// Empties the log and keeps a little memory for its next user.
  void clear() noexcept;

  [[nodiscard]] std::uint64_t bytes() const noexcept;

 private:
  struct Position {
    std::size_t runs;
    std::uint64_t last;
  };

  [[nodiscard]] Position position() const noexcept;
  void roll_back(const Position& position) noexcept;
  void push(std::uint64_t begin, std::uint64_t count);
  void condense();

  std::uint64_t num_slots_;
  std::vector<std::uint64_t> runs_;
  std::unique_ptr<SlotBitmap> dense_;
};

}  // namespace pipelive
