#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pipelive/base/slot_range.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive {

/// Marks of written slots that a device makes itself, in the same launch as the writes, so that no
/// slot mapping is copied to the host.
///
/// There are several *sets* of marks, each with one bit per slot. A step marks in a set of its own
/// while it is in flight, so that what it has written so far is never taken with the marks of steps
/// that are complete. DirtyTracker hands the sets out; a source only stores them.
///
/// Calls may come from several threads, but a set that one call is given no other call is given
/// meanwhile, and no step in flight marks in it. fold, take and clear are complete when they
/// return; they throw Error(device) or Error(timeout) where the device fails.
class MarkSource {
 public:
  MarkSource() = default;
  MarkSource(const MarkSource&) = delete;
  MarkSource& operator=(const MarkSource&) = delete;
  virtual ~MarkSource() = default;

  [[nodiscard]] virtual std::uint64_t num_slots() const noexcept = 0;
  /// At least 3; all are empty at first.
  [[nodiscard]] virtual unsigned num_sets() const noexcept = 0;
  [[nodiscard]] virtual std::uint64_t memory_bytes() const noexcept = 0;

  /// Writes that `stream` is given from now on mark in `set`.
  virtual void select(unsigned set, Stream stream) = 0;
  /// Marks the end of the work that `stream` has been given so far.
  [[nodiscard]] virtual std::shared_ptr<Event> record(Stream stream) = 0;

  /// Moves the marks of `sets` to the set `into`, which is not among them; returns how many slots
  /// were not marked there.
  virtual std::uint64_t fold(std::span<const unsigned> sets, unsigned into) = 0;
  /// Appends the slots that are marked in any of `sets`, as sorted, disjoint, maximal ranges, and
  /// empties the sets. Where it throws, nothing is lost.
  virtual void take(std::span<const unsigned> sets, std::vector<SlotRange>& ranges) = 0;
  /// Empties all sets.
  virtual void clear() = 0;
};

}  // namespace pipelive
