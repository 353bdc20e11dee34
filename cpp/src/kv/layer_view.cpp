#include "pipelive/kv/layer_view.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr double kUseSeconds = 30.0;

std::array<std::int64_t, 5> shape_of(const KVSpec& spec, std::uint64_t num_blocks) {
  return {static_cast<std::int64_t>(num_blocks), spec.num_kv_heads, 2, spec.block_size,
          spec.head_dim};
}

std::array<std::int64_t, 5> strides_of(const KVSpec& spec, std::size_t block_stride) {
  const std::int64_t heads = spec.num_kv_heads;
  const std::int64_t tokens = spec.block_size;
  const std::int64_t dim = spec.head_dim;
  const auto block = static_cast<std::int64_t>(block_stride / size_of(spec.dtype));
  if (spec.order == BlockOrder::hnd) return {block, 2 * tokens * dim, tokens * dim, dim, 1};
  return {block, dim, tokens * heads * dim, heads * dim, 1};
}

std::string list(const std::array<std::int64_t, 5>& values) {
  std::string text = "[";
  for (std::size_t i = 0; i < values.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  }
  return text + "]";
}

// Elements do not share memory where, from the smallest stride to the largest, each axis steps over
// all that the axes before it span.
bool elements_distinct(const AdoptedTensor& tensor) {
  std::array<std::size_t, 5> order{0, 1, 2, 3, 4};
  std::sort(order.begin(), order.end(), [&tensor](std::size_t a, std::size_t b) {
    return tensor.strides[a] < tensor.strides[b];
  });
  std::int64_t span = 1;
  for (const std::size_t axis : order) {
    if (tensor.shape[axis] == 1) continue;
    if (tensor.strides[axis] < span) return false;
    if (tensor.strides[axis] > (std::int64_t{1} << 46) / tensor.shape[axis]) return false;
    span += tensor.strides[axis] * (tensor.shape[axis] - 1);
  }
  return true;
}

void check_tensor(const KVSpec& spec, const AdoptedTensor& tensor) {
  const auto refuse = [&tensor](const std::string& what) {
    throw Error(ErrorCode::invalid_argument,
                "adopted tensor of layer " + std::to_string(tensor.layer) + what);
  };
  const auto expected = shape_of(spec, static_cast<std::uint64_t>(tensor.shape[0]));
  if (tensor.shape != expected || tensor.shape[0] < 1) {
    refuse(" has shape " + list(tensor.shape) + ", expected [blocks, " +
           std::to_string(spec.num_kv_heads) + ", 2, " + std::to_string(spec.block_size) + ", " +
           std::to_string(spec.head_dim) + "]");
  }
  if (tensor.data == nullptr) refuse(" has no memory");
  if (tensor.strides[4] != 1) {
    refuse(" has strides " + list(tensor.strides) + ", expected 1 for the last axis");
  }
  if (*std::min_element(tensor.strides.begin(), tensor.strides.end()) < 0 ||
      !elements_distinct(tensor)) {
    refuse(" has strides " + list(tensor.strides) + ", expected elements that do not share memory");
  }
}

}  // namespace

LayerView::LayerView(std::shared_ptr<KVPool> pool, std::uint32_t layer)
    : layer_(layer),
      spec_(pool->spec()),
      layout_(pool->layout()),
      memory_(pool->layer_memory(layer)),
      shape_(shape_of(spec_, memory_.num_blocks)),
      strides_(strides_of(spec_, memory_.block_stride)),
      device_kind_(pool->device()->info().kind),
      device_index_(pool->device()->info().index) {
  blocks_ = std::move(pool);
}

LayerView::LayerView(std::shared_ptr<const BlockMemory> blocks, std::uint32_t layer,
                     const KVSpec& spec, BlockLayout layout, LayerMemory memory,
                     std::array<std::int64_t, 5> strides, DeviceKind device_kind, int device_index)
    : blocks_(std::move(blocks)),
      layer_(layer),
      spec_(spec),
      layout_(std::move(layout)),
      memory_(memory),
      shape_(shape_of(spec, memory.num_blocks)),
      strides_(strides),
      device_kind_(device_kind),
      device_index_(device_index) {}

std::shared_ptr<AdoptedPool> AdoptedPool::create(const KVSpec& spec, std::uint32_t num_layers,
                                                 std::vector<AdoptedTensor> tensors,
                                                 DeviceKind device_kind, int device_index) {
  spec.validate();
  if (num_layers < 1 || tensors.empty()) {
    throw Error(ErrorCode::invalid_argument,
                "adopt: " + std::to_string(tensors.size()) + " tensors for a model of " +
                    std::to_string(num_layers) + " layers, expected at least one of each");
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const AdoptedTensor& a, const AdoptedTensor& b) { return a.layer < b.layer; });
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const AdoptedTensor& tensor = tensors[i];
    if (tensor.layer >= num_layers || (i > 0 && tensor.layer == tensors[i - 1].layer)) {
      throw Error(ErrorCode::invalid_argument, "adopt: layer " + std::to_string(tensor.layer) +
                                                   " is named twice or is not in the model of " +
                                                   std::to_string(num_layers));
    }
    check_tensor(spec, tensor);
    if (tensor.shape[0] != tensors[0].shape[0]) {
      throw Error(ErrorCode::invalid_argument,
                  "adopted tensor of layer " + std::to_string(tensor.layer) + " has " +
                      std::to_string(tensor.shape[0]) + " blocks, the others have " +
                      std::to_string(tensors[0].shape[0]));
    }
  }
  return std::shared_ptr<AdoptedPool>(
      new AdoptedPool(spec, num_layers, std::move(tensors), device_kind, device_index));
}

AdoptedPool::AdoptedPool(const KVSpec& spec, std::uint32_t num_layers,
                         std::vector<AdoptedTensor> tensors, DeviceKind device_kind,
                         int device_index)
    : spec_(spec),
      num_layers_(num_layers),
      tensors_(std::move(tensors)),
      num_blocks_(static_cast<std::uint64_t>(tensors_.front().shape[0])),
      device_kind_(device_kind),
      device_index_(device_index),
      residency_(num_layers) {
  for (const AdoptedTensor& tensor : tensors_) residency_.set_limit(tensor.layer, num_blocks_);
}

std::vector<std::uint32_t> AdoptedPool::layers() const {
  std::vector<std::uint32_t> layers;
  layers.reserve(tensors_.size());
  for (const AdoptedTensor& tensor : tensors_) layers.push_back(tensor.layer);
  return layers;
}

LayerView AdoptedPool::layer(std::uint32_t layer) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [layer](const AdoptedTensor& t) { return t.layer == layer; });
  if (found == tensors_.end()) {
    throw Error(ErrorCode::invalid_argument,
                "layer is " + std::to_string(layer) + ", which was not adopted");
  }
  const std::size_t item = size_of(spec_.dtype);
  std::array<std::size_t, 5> bytes{};
  for (std::size_t axis = 0; axis < bytes.size(); ++axis) {
    bytes[axis] = static_cast<std::size_t>(found->strides[axis]) * item;
  }
  BlockLayout layout = spec_.layout();
  layout.token_stride = bytes[3];
  for (std::size_t f = 0; f < layout.fragment_offsets.size(); ++f) {
    layout.fragment_offsets[f] = f / 2 * bytes[1] + f % 2 * bytes[2];
  }
  return {shared_from_this(),
          layer,
          spec_,
          std::move(layout),
          {found->data, bytes[0], num_blocks_},
          found->strides,
          device_kind_,
          device_index_};
}

void AdoptedPool::check_open() const {
  if (closed_.load(std::memory_order_acquire)) {
    throw Error(ErrorCode::closed, "the adopted pool is closed");
  }
}

void AdoptedPool::close() {
  const Residency::Exclusive exclusive = residency_.exclude(Deadline::after_seconds(kUseSeconds));
  closed_.store(true, std::memory_order_release);
  for (const AdoptedTensor& tensor : tensors_) residency_.set_limit(tensor.layer, 0);
}

}  // namespace pipelive
