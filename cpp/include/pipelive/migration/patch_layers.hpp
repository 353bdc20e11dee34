#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pipelive/kv/spec.hpp"

namespace pipelive {

/// One moving layer at this end.
struct PatchLayer {
  std::uint32_t layer = 0;
  BlockLayout layout;
  LayerMemory memory;
  std::shared_ptr<const void> owner;  ///< keeps `memory` mapped; may be empty
};

/// The moving layers of a session, ascending. Their memory order may differ from the peer's and
/// from each other's; what travels may not.
class PatchLayers {
 public:
  /// Throws Error(invalid_argument) naming the layer: named twice, without memory, or with a block
  /// size or a slot size that is not that of `spec`.
  PatchLayers(const KVSpec& spec, std::vector<PatchLayer> layers);

  [[nodiscard]] const KVSpec& spec() const noexcept { return spec_; }
  [[nodiscard]] std::span<const PatchLayer> all() const noexcept { return layers_; }
  [[nodiscard]] std::span<const std::uint32_t> ids() const noexcept { return ids_; }
  [[nodiscard]] std::size_t size() const noexcept { return layers_.size(); }
  /// The place of `layer` in `all`, or -1.
  [[nodiscard]] std::ptrdiff_t find(std::uint32_t layer) const noexcept;
  /// The same for a layer that a caller named; throws Error(invalid_argument).
  [[nodiscard]] std::size_t at(std::uint32_t layer) const;

  /// Bytes of one slot of one layer, as it travels.
  [[nodiscard]] std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  [[nodiscard]] std::uint32_t block_size() const noexcept { return spec_.block_size; }
  /// Block ids that every layer has addresses for.
  [[nodiscard]] std::uint64_t max_blocks() const noexcept { return max_blocks_; }
  [[nodiscard]] std::uint64_t max_slots() const noexcept { return max_blocks_ * spec_.block_size; }

 private:
  KVSpec spec_;
  std::vector<PatchLayer> layers_;
  std::vector<std::uint32_t> ids_;
  std::size_t slot_bytes_ = 0;
  std::uint64_t max_blocks_ = 0;
};

/// Ranges in bytes of block ids and back are easy to get wrong, so the rule is in one place: a
/// capacity of `blocks` makes the slots [0, blocks * block_size) usable.
[[nodiscard]] std::uint64_t checked_capacity(const PatchLayers& layers, std::uint64_t blocks);

}  // namespace pipelive
