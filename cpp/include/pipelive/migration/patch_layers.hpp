#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pipelive/kv/layer_view.hpp"
#include "pipelive/kv/residency.hpp"
#include "pipelive/kv/spec.hpp"
#include "pipelive/transport/slot_copier.hpp"

namespace pipelive {

/// One moving layer at this end.
struct PatchLayer {
  std::uint32_t layer = 0;
  BlockLayout layout;
  LayerMemory memory;
  /// Says which blocks are mapped, and keeps them so while they are used. Empty where all blocks of
  /// `memory` always are.
  std::shared_ptr<const BlockMemory> blocks;
  /// Packs and unpacks the layer's slots; empty stands for host_slot_copier().
  std::shared_ptr<SlotCopier> copier = nullptr;

  /// `copier` is for the device that the layer lies on; layers in host memory need none. Throws
  /// Error(invalid_argument) where it is for another kind of device.
  [[nodiscard]] static PatchLayer of(const LayerView& view,
                                     std::shared_ptr<SlotCopier> copier = nullptr);
};

/// The moving layers of a session, ascending. Their memory order may differ from the peer's and
/// from each other's, and so may the peer's kind of device; what travels may not. The layers of one
/// end share one copier.
///
/// While the object lives, the copier's stream is noted in the layers' memories, so that blocks are
/// not unmapped under work that a call has left behind; longer where such work is still under way.
class PatchLayers {
 public:
  /// Throws Error(invalid_argument) naming the layer: named twice, without memory, with a copier
  /// of its own, or with a block size or a slot size that is not that of `spec`.
  PatchLayers(const KVSpec& spec, std::vector<PatchLayer> layers);

  [[nodiscard]] const KVSpec& spec() const noexcept { return spec_; }
  [[nodiscard]] std::span<const PatchLayer> all() const noexcept { return layers_; }
  [[nodiscard]] std::span<const std::uint32_t> ids() const noexcept { return ids_; }
  [[nodiscard]] std::size_t size() const noexcept { return layers_.size(); }
  /// The place of `layer` in `all`, or -1.
  [[nodiscard]] std::ptrdiff_t find(std::uint32_t layer) const noexcept;
  /// The same for a layer that a caller named; throws Error(invalid_argument).
  [[nodiscard]] std::size_t at(std::uint32_t layer) const;

  /// Packs and unpacks the slots of all these layers; one thread at a time uses it.
  [[nodiscard]] SlotCopier& copier() const noexcept { return *copier_; }
  [[nodiscard]] const std::shared_ptr<SlotCopier>& shared_copier() const noexcept {
    return copier_;
  }

  /// Bytes of one slot of one layer, as it travels.
  [[nodiscard]] std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  [[nodiscard]] std::uint32_t block_size() const noexcept { return spec_.block_size; }
  /// Block ids that every layer has addresses for.
  [[nodiscard]] std::uint64_t max_blocks() const noexcept { return max_blocks_; }
  [[nodiscard]] std::uint64_t max_slots() const noexcept { return max_blocks_ * spec_.block_size; }

  /// While the result lives, no block that is mapped is unmapped. May wait for a resize under way.
  [[nodiscard]] std::vector<Residency::Use> use() const;
  /// Block ids [0, n) are mapped in every layer; 0 where a layer is not held. Stays true under
  /// use().
  [[nodiscard]] std::uint64_t resident_blocks() const noexcept;

 private:
  KVSpec spec_;
  std::vector<PatchLayer> layers_;
  std::vector<std::uint32_t> ids_;
  std::shared_ptr<SlotCopier> copier_;
  std::vector<std::shared_ptr<const BlockMemory>> memories_;  // each once
  std::shared_ptr<const void> noted_;                         // takes the copier's stream back
  std::size_t slot_bytes_ = 0;
  std::uint64_t max_blocks_ = 0;
};

}  // namespace pipelive
