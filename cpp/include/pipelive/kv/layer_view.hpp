#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "pipelive/device/device.hpp"
#include "pipelive/kv/kv_pool.hpp"
#include "pipelive/kv/residency.hpp"
#include "pipelive/kv/spec.hpp"

namespace pipelive {

/// One layer's blocks as a strided 5-D tensor [block, kv_head, 2, token, dim], whatever their order
/// in memory. Length 0 of the first axis is the reserved maximum, not the capacity: which blocks
/// may be touched is what check_resident says. Copyable; keeps the memory's addresses reserved.
class LayerView {
 public:
  /// A layer of the pool, held or not. Throws Error(invalid_argument) for a layer beyond the model.
  LayerView(std::shared_ptr<KVPool> pool, std::uint32_t layer);
  /// For memory of another kind (AdoptedPool). `strides` are in elements.
  LayerView(std::shared_ptr<const BlockMemory> blocks, std::uint32_t layer, const KVSpec& spec,
            BlockLayout layout, LayerMemory memory, std::array<std::int64_t, 5> strides,
            DeviceKind device_kind, int device_index);

  [[nodiscard]] std::uint32_t layer() const noexcept { return layer_; }
  [[nodiscard]] const KVSpec& spec() const noexcept { return spec_; }
  [[nodiscard]] const BlockLayout& layout() const noexcept { return layout_; }
  [[nodiscard]] const LayerMemory& memory() const noexcept { return memory_; }
  [[nodiscard]] const std::shared_ptr<const BlockMemory>& blocks() const noexcept {
    return blocks_;
  }
  [[nodiscard]] DeviceKind device_kind() const noexcept { return device_kind_; }
  [[nodiscard]] int device_index() const noexcept { return device_index_; }
  [[nodiscard]] const std::array<std::int64_t, 5>& shape() const noexcept { return shape_; }
  /// In elements.
  [[nodiscard]] const std::array<std::int64_t, 5>& strides() const noexcept { return strides_; }

  /// Throws Error(closed) or Error(not_resident), see Residency::check. To be sure that blocks stay
  /// while they are touched, take use() first, then check, and keep the Use.
  template <typename T>
  void check_resident(std::span<const T> ids) const {
    blocks_->check_open();
    blocks_->residency().check(layer_, ids);
  }
  void check_resident_range(std::uint64_t begin, std::uint64_t end) const {
    blocks_->check_open();
    blocks_->residency().check_range(layer_, begin, end);
  }
  [[nodiscard]] Residency::Use use() const { return blocks_->residency().use(); }
  /// To be called by whoever gives `stream` work on the blocks; see Residency::note_stream.
  void note_stream(Stream stream, std::shared_ptr<void> owner = nullptr) const {
    blocks_->residency().note_stream(stream, std::move(owner));
  }
  /// Blocks [0, n) of this layer are resident.
  [[nodiscard]] std::uint64_t resident_blocks() const noexcept {
    return blocks_->residency().limit(layer_);
  }

 private:
  std::shared_ptr<const BlockMemory> blocks_;
  std::uint32_t layer_;
  KVSpec spec_;
  BlockLayout layout_;
  LayerMemory memory_;
  std::array<std::int64_t, 5> shape_{};
  std::array<std::int64_t, 5> strides_{};
  DeviceKind device_kind_;
  int device_index_;
};

/// One layer's KV tensor that an engine allocated itself, in the canonical order of axes.
struct AdoptedTensor {
  std::uint32_t layer = 0;
  std::byte* data = nullptr;
  std::array<std::int64_t, 5> shape{};    ///< [blocks, kv_heads, 2, block_size, head_dim]
  std::array<std::int64_t, 5> strides{};  ///< in elements
  std::shared_ptr<void> owner;            ///< keeps the memory alive
};

/// Tensors of an engine, so that tracker, attention and transport work on them without our
/// allocator. Nothing can be resized; every block of every adopted layer is resident.
class AdoptedPool final : public BlockMemory, public std::enable_shared_from_this<AdoptedPool> {
 public:
  /// Throws Error(invalid_argument) naming the layer, where a tensor does not have the spec's
  /// shape, where its last axis is not contiguous, or where elements of it overlap.
  [[nodiscard]] static std::shared_ptr<AdoptedPool> create(const KVSpec& spec,
                                                           std::uint32_t num_layers,
                                                           std::vector<AdoptedTensor> tensors,
                                                           DeviceKind device_kind,
                                                           int device_index);

  [[nodiscard]] const KVSpec& spec() const noexcept { return spec_; }
  [[nodiscard]] std::uint32_t num_layers() const noexcept { return num_layers_; }
  [[nodiscard]] std::vector<std::uint32_t> layers() const;  ///< ascending
  [[nodiscard]] std::uint64_t num_blocks() const noexcept { return num_blocks_; }
  [[nodiscard]] LayerView layer(std::uint32_t layer) const;
  [[nodiscard]] const Residency& residency() const noexcept override { return residency_; }
  void check_open() const override;
  /// Lets go of the tensors once nothing uses them; views keep them alive, and refuse.
  void close();

 private:
  AdoptedPool(const KVSpec& spec, std::uint32_t num_layers, std::vector<AdoptedTensor> tensors,
              DeviceKind device_kind, int device_index);

  const KVSpec spec_;
  const std::uint32_t num_layers_;
  const std::vector<AdoptedTensor> tensors_;  ///< ascending by layer
  const std::uint64_t num_blocks_;
  const DeviceKind device_kind_;
  const int device_index_;
  std::atomic<bool> closed_{false};
  Residency residency_;
};

}  // namespace pipelive
