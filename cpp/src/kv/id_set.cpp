#include "pipelive/kv/id_set.hpp"

#include <bit>

namespace pipelive {

IdSet::IdSet(std::uint64_t limit) {
  std::uint64_t words = limit;
  do {
    words = (words + 63) / 64;
    levels_.emplace_back(words);
  } while (words > 1);
}

void IdSet::insert(std::uint64_t id) noexcept {
  ++size_;
  for (std::vector<std::uint64_t>& level : levels_) {
    const bool was_empty = level[id / 64] == 0;
    level[id / 64] |= std::uint64_t{1} << (id % 64);
    if (!was_empty) return;
    id /= 64;
  }
}

void IdSet::erase(std::uint64_t id) noexcept {
  --size_;
  for (std::vector<std::uint64_t>& level : levels_) {
    level[id / 64] &= ~(std::uint64_t{1} << (id % 64));
    if (level[id / 64] != 0) return;
    id /= 64;
  }
}

std::uint64_t IdSet::lowest() const noexcept {
  std::uint64_t id = 0;
  for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
    id = id * 64 + static_cast<std::uint64_t>(std::countr_zero((*level)[id]));
  }
  return id;
}

}  // namespace pipelive
