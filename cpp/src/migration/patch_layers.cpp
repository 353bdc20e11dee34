#include "pipelive/migration/patch_layers.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

// The copier's stream, noted in memories.
class Noted {
 public:
  Noted(std::shared_ptr<SlotCopier> copier, Stream stream,
        std::vector<std::shared_ptr<const BlockMemory>> memories)
      : copier_(std::move(copier)), stream_(stream), memories_(std::move(memories)) {
    for (const auto& memory : memories_) memory->residency().note_stream(stream_, copier_);
  }
  ~Noted() {
    // Else the memory waits for the stream as long as it is there itself, and keeps the copier.
    if (!copier_->idle()) return;
    for (const auto& memory : memories_) memory->residency().forget_stream(stream_);
  }
  Noted(const Noted&) = delete;
  Noted& operator=(const Noted&) = delete;

 private:
  std::shared_ptr<SlotCopier> copier_;
  Stream stream_;
  std::vector<std::shared_ptr<const BlockMemory>> memories_;
};

}  // namespace

PatchLayer PatchLayer::of(const LayerView& view, std::shared_ptr<SlotCopier> copier) {
  if (!copier) copier = host_slot_copier();
  if (view.device_kind() != copier->kind()) {
    const auto name = [](DeviceKind kind) {
      return std::string(kind == DeviceKind::host ? "host" : "device");
    };
    throw Error(ErrorCode::invalid_argument,
                "layer " + std::to_string(view.layer()) + " lies in " + name(view.device_kind()) +
                    " memory, its copier is for " + name(copier->kind()) + " memory");
  }
  return {view.layer(), view.layout(), view.memory(), view.blocks(), std::move(copier)};
}

PatchLayers::PatchLayers(const KVSpec& spec, std::vector<PatchLayer> layers)
    : spec_(spec), layers_(std::move(layers)) {
  const BlockLayout own = spec_.layout();
  slot_bytes_ = own.slot_bytes();
  std::sort(layers_.begin(), layers_.end(),
            [](const PatchLayer& a, const PatchLayer& b) { return a.layer < b.layer; });
  copier_ =
      layers_.empty() || !layers_.front().copier ? host_slot_copier() : layers_.front().copier;
  max_blocks_ = layers_.empty() ? 0 : std::numeric_limits<std::uint64_t>::max();
  for (const PatchLayer& layer : layers_) {
    const std::string name = "layer " + std::to_string(layer.layer);
    if (!ids_.empty() && ids_.back() == layer.layer) {
      throw Error(ErrorCode::invalid_argument, name + " is named twice");
    }
    if ((layer.copier ? layer.copier : host_slot_copier()) != copier_) {
      throw Error(ErrorCode::invalid_argument, name + " has another copier than layer " +
                                                   std::to_string(ids_.front()) +
                                                   "; the layers of one session lie on one device");
    }
    if (layer.memory.base == nullptr || layer.memory.num_blocks == 0) {
      throw Error(ErrorCode::invalid_argument, name + " has no memory");
    }
    if (layer.layout.block_size != own.block_size ||
        layer.layout.fragment_bytes != own.fragment_bytes ||
        layer.layout.fragment_offsets.size() != own.fragment_offsets.size()) {
      throw Error(ErrorCode::invalid_argument,
                  name + " has blocks of " + std::to_string(layer.layout.block_size) +
                      " tokens of " + std::to_string(layer.layout.slot_bytes()) +
                      " bytes; the spec says " + std::to_string(own.block_size) + " and " +
                      std::to_string(slot_bytes_));
    }
    if (layer.blocks &&
        std::find(memories_.begin(), memories_.end(), layer.blocks) == memories_.end()) {
      memories_.push_back(layer.blocks);
    }
    ids_.push_back(layer.layer);
    max_blocks_ = std::min(max_blocks_, layer.memory.num_blocks);
  }
  if (const std::optional<Stream> stream = copier_->work_stream()) {
    noted_ = std::make_shared<const Noted>(copier_, *stream, memories_);
  }
}

std::ptrdiff_t PatchLayers::find(std::uint32_t layer) const noexcept {
  const auto found = std::lower_bound(ids_.begin(), ids_.end(), layer);
  return found != ids_.end() && *found == layer ? found - ids_.begin() : -1;
}

std::size_t PatchLayers::at(std::uint32_t layer) const {
  const std::ptrdiff_t place = find(layer);
  if (place < 0) {
    throw Error(ErrorCode::invalid_argument,
                "layer " + std::to_string(layer) + " is not one of the moving layers");
  }
  return static_cast<std::size_t>(place);
}

std::vector<Residency::Use> PatchLayers::use() const {
  std::vector<Residency::Use> uses;
  uses.reserve(memories_.size());
  for (const auto& memory : memories_) uses.push_back(memory->residency().use());
  return uses;
}

std::uint64_t PatchLayers::resident_blocks() const noexcept {
  std::uint64_t blocks = max_blocks_;
  for (const PatchLayer& layer : layers_) {
    if (layer.blocks) blocks = std::min(blocks, layer.blocks->residency().limit(layer.layer));
  }
  return blocks;
}

}  // namespace pipelive
