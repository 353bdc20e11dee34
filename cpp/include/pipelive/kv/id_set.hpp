#pragma once

#include <cstdint>
#include <vector>

namespace pipelive {

/// A set of numbers below a fixed limit as a tree of bitmaps: whatever the limit, the lowest member
/// is found by reading one word per level (five for 2^30). Not thread-safe.
class IdSet {
 public:
  /// Throws std::bad_alloc.
  explicit IdSet(std::uint64_t limit);

  /// Adds an id that is not a member, below the limit.
  void insert(std::uint64_t id) noexcept;
  /// Takes out a member.
  void erase(std::uint64_t id) noexcept;
  [[nodiscard]] bool contains(std::uint64_t id) const noexcept {
    return (levels_[0][id / 64] >> (id % 64) & 1) != 0;
  }
  /// The lowest member; the set must not be empty.
  [[nodiscard]] std::uint64_t lowest() const noexcept;
  [[nodiscard]] std::uint64_t size() const noexcept { return size_; }

 private:
  // levels_[0] has a bit per id; a bit of a level says that the word below it is not zero.
  std::vector<std::vector<std::uint64_t>> levels_;
  std::uint64_t size_ = 0;
};

}  // namespace pipelive
