#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "pipelive/base/slot_range.hpp"

namespace pipelive {

/// One bit per slot, and above it one bit per 64-slot word that is not zero, so that draining a few
/// marks out of many slots reads only the words that hold them. Not thread-safe.
class SlotBitmap {
 public:
  /// Throws std::bad_alloc.
  explicit SlotBitmap(std::uint64_t num_slots);

  /// Marks [begin, begin + count), which the caller has checked; returns how many were not marked.
  std::uint64_t set(std::uint64_t begin, std::uint64_t count) noexcept {
    if (count == 1) {
      const std::uint64_t index = begin / 64;
      const std::uint64_t bit = std::uint64_t{1} << (begin % 64);
      const bool fresh = (words_[index] & bit) == 0;
      words_[index] |= bit;
      summary_[index / 64] |= std::uint64_t{1} << (index % 64);
      return fresh ? 1 : 0;
    }
    return count == 0 ? 0 : set_range(begin, begin + count);
  }

  /// Marks every slot that `other`, of the same size, marks; returns how many were not marked.
  std::uint64_t merge(const SlotBitmap& other) noexcept;

  /// Appends the marked slots to `ranges`, sorted, disjoint and maximal, and unmarks them. Throws
  /// std::bad_alloc before anything has changed.
  void drain(std::vector<SlotRange>& ranges);

  /// Unmarks everything.
  void clear() noexcept;

  [[nodiscard]] std::uint64_t bytes() const noexcept {
    return (words_.size() + summary_.size()) * sizeof(std::uint64_t);
  }

 private:
  /// Calls visit(index) for every word that is not zero, ascending.
  template <typename Visit>
  void for_each_word(Visit&& visit) const {
    for (std::uint64_t group = 0; group < summary_.size(); ++group) {
      for (std::uint64_t left = summary_[group]; left != 0; left &= left - 1) {
        visit(group * 64 + static_cast<std::uint64_t>(std::countr_zero(left)));
      }
    }
  }

  std::uint64_t set_range(std::uint64_t begin, std::uint64_t end) noexcept;
  [[nodiscard]] std::uint64_t count_ranges() const noexcept;

  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> summary_;
};

}  // namespace pipelive
