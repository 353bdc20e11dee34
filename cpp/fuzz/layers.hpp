#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "fuzz_tools.hpp"
#include "pipelive/migration/patch_layers.hpp"

namespace pipelive::fuzz {

/// The moving layers of one end: `kLayers` of stacks of two, whose other half is nobody's.
class Layers {
 public:
  static constexpr std::uint64_t kBlocks = 12;
  static constexpr std::uint32_t kBlockSize = 4;
  static constexpr std::uint64_t kSlots = kBlocks * kBlockSize;
  static constexpr std::uint32_t kIds[2] = {2, 5};

  explicit Layers(BlockOrder order)
      : spec_{2, 8, DType::bfloat16, kBlockSize, order}, layout_(spec_.layout()) {
    for (std::vector<std::byte>& layer : bytes_) {
      layer.resize((kBlocks + 1) * stride());
      std::fill(layer.begin(), layer.end(), std::byte{0xEE});
    }
  }

  [[nodiscard]] PatchLayers patch_layers() {
    std::vector<PatchLayer> layers;
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      layers.push_back({kIds[i], layout_, {bytes_[i].data(), stride(), kBlocks}, nullptr});
    }
    return {spec_, std::move(layers)};
  }

  [[nodiscard]] std::size_t slot_bytes() const { return layout_.slot_bytes(); }
  [[nodiscard]] const KVSpec& spec() const { return spec_; }

  /// Every byte that belongs to no slot of `may[place]` is as it was.
  void require_untouched_but(const std::vector<bool> (&may)[2]) const {
    std::vector<bool> allowed(bytes_[0].size());
    const std::size_t fragment = layout_.fragment_bytes;
    for (std::size_t place = 0; place < bytes_.size(); ++place) {
      std::fill(allowed.begin(), allowed.end(), false);
      for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
        if (!may[place][slot]) continue;
        const std::size_t block = slot / kBlockSize * stride();
        for (const std::size_t offset : layout_.fragment_offsets) {
          const std::size_t at = block + offset + slot % kBlockSize * layout_.token_stride;
          std::fill_n(allowed.begin() + static_cast<std::ptrdiff_t>(at), fragment, true);
        }
      }
      for (std::size_t at = 0; at < bytes_[place].size(); ++at) {
        require(allowed[at] || bytes_[place][at] == std::byte{0xEE},
                "nothing but slots that a record names is written");
      }
    }
  }

 private:
  [[nodiscard]] std::size_t stride() const { return 2 * layout_.block_bytes; }

  KVSpec spec_;
  BlockLayout layout_;
  std::array<std::vector<std::byte>, 2> bytes_;
};

}  // namespace pipelive::fuzz
