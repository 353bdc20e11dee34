#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "pipelive/base/slot_range.hpp"

namespace pipelive {

/// The generation that each slot of one layer holds; 0 is older than everything. Memory is taken in
/// chunks as slots are first written.
class Generations {
 public:
  explicit Generations(std::uint64_t num_slots)
      : num_slots_(num_slots), chunks_((num_slots + kChunk - 1) / kChunk) {}

  /// Puts into `fresh` the parts of `range` that do not hold anything newer than `generation`, in
  /// ascending order, and marks them as holding it. The range lies inside the layer.
  void claim(SlotRange range, std::uint64_t generation, std::vector<SlotRange>& fresh) {
    fresh.clear();
    for (std::uint64_t slot = range.begin; slot < range.end();) {
      std::vector<std::uint64_t>& chunk = chunks_[slot / kChunk];
      if (chunk.empty()) chunk.resize(kChunk);
      const std::uint64_t end = std::min(range.end(), (slot / kChunk + 1) * kChunk);
      claim_run({chunk.data() + slot % kChunk, end - slot}, slot, generation, fresh);
      slot = end;
    }
  }

  [[nodiscard]] std::uint64_t at(std::uint64_t slot) const {
    const std::vector<std::uint64_t>& chunk = chunks_.at(slot / kChunk);
    return chunk.empty() ? 0 : chunk[slot % kChunk];
  }
  [[nodiscard]] std::uint64_t num_slots() const noexcept { return num_slots_; }

 private:
  static constexpr std::uint64_t kChunk = 4096;

  static void claim_run(std::span<std::uint64_t> held, std::uint64_t first_slot,
                        std::uint64_t generation, std::vector<SlotRange>& fresh) {
    for (std::size_t at = 0; at < held.size();) {
      while (at < held.size() && held[at] > generation) ++at;
      const std::size_t first = at;
      while (at < held.size() && held[at] <= generation) held[at++] = generation;
      if (at == first) continue;
      const SlotRange run{first_slot + first, at - first};
      // A chunk's end does not cut a run in two.
      if (!fresh.empty() && fresh.back().end() == run.begin) {
        fresh.back().count += run.count;
      } else {
        fresh.push_back(run);
      }
    }
  }

  std::uint64_t num_slots_;
  std::vector<std::vector<std::uint64_t>> chunks_;
};

}  // namespace pipelive
