#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "pipelive/base/slot_range.hpp"
#include "pipelive/kv/spec.hpp"

namespace pipelive::test {

/// One layer in plain memory, with room between its blocks as in a stack of `stack` layers, and a
/// guard block behind, so that writes outside are seen.
class PlainLayer {
 public:
  PlainLayer(const KVSpec& kv, std::uint64_t blocks, std::size_t stack = 1)
      : spec(kv),
        layout(kv.layout()),
        stride(layout.block_bytes * stack),
        bytes((blocks + 1) * stride) {
    memory = {bytes.data(), stride, blocks};
  }
  PlainLayer(PlainLayer&&) = delete;

  void fill(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  }
  [[nodiscard]] std::uint64_t slots() const { return memory.num_blocks * spec.block_size; }

  /// The bytes of one slot in canonical order, by definition rather than by the code under test.
  [[nodiscard]] std::vector<std::byte> slot(std::uint64_t slot) const {
    std::vector<std::byte> state;
    const std::size_t block = slot / spec.block_size * stride;
    const std::size_t token = slot % spec.block_size;
    const std::size_t dim = spec.head_dim * size_of(spec.dtype);
    for (std::size_t head = 0; head < spec.num_kv_heads; ++head) {
      for (std::size_t kv = 0; kv < 2; ++kv) {
        const std::size_t at =
            spec.order == BlockOrder::hnd
                ? ((head * 2 + kv) * spec.block_size + token) * dim
                : ((kv * spec.block_size + token) * spec.num_kv_heads + head) * dim;
        state.insert(state.end(), bytes.begin() + static_cast<std::ptrdiff_t>(block + at),
                     bytes.begin() + static_cast<std::ptrdiff_t>(block + at + dim));
      }
    }
    return state;
  }

  KVSpec spec;
  BlockLayout layout;
  std::size_t stride;
  std::vector<std::byte> bytes;
  LayerMemory memory;
};

inline std::vector<SlotRange> random_ranges(std::mt19937_64& random, std::uint64_t slots,
                                            std::size_t count, std::uint64_t longest) {
  std::vector<SlotRange> ranges;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t begin = random() % slots;
    ranges.push_back({begin, 1 + random() % std::min(longest, slots - begin)});
  }
  return ranges;
}

inline std::uint64_t total(const std::vector<SlotRange>& ranges) {
  std::uint64_t slots = 0;
  for (const SlotRange& range : ranges) slots += range.count;
  return slots;
}

}  // namespace pipelive::test
