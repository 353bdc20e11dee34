#pragma once

#include <cstdint>

namespace pipelive {

/// `count` neighbouring slots from `begin`; a slot is block_id * block_size + offset.
struct SlotRange {
  std::uint64_t begin = 0;
  std::uint64_t count = 0;

  [[nodiscard]] std::uint64_t end() const noexcept { return begin + count; }
  friend bool operator==(const SlotRange&, const SlotRange&) = default;
};

}  // namespace pipelive
