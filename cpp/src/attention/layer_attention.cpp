#include "pipelive/attention/layer_attention.hpp"

#include "dispatch.hpp"

namespace pipelive {

namespace {

void require_host(const LayerView& layer) {
  if (layer.device_kind() != DeviceKind::host) {
    attention_detail::refuse("kv", "on a GPU", "memory of the host");
  }
}

}  // namespace

KVView kv_view_of(const LayerView& layer) {
  KVView view;
  view.base = layer.memory().base;
  view.dtype = layer.spec().dtype;
  view.num_blocks = layer.shape()[0];
  view.kv_heads = layer.shape()[1];
  view.block_size = layer.shape()[3];
  view.head_dim = layer.shape()[4];
  view.block_stride = layer.strides()[0];
  view.head_stride = layer.strides()[1];
  view.kv_stride = layer.strides()[2];
  view.token_stride = layer.strides()[3];
  view.require_resident = [layer](std::span<const std::int32_t> blocks) {
    layer.check_resident(blocks);
  };
  return view;
}

void append(const LayerView& layer, const TokenView& key, const TokenView& value,
            std::span<const std::int64_t> slots, std::optional<Isa> isa) {
  require_host(layer);
  const Residency::Use use = layer.use();
  append(kv_view_of(layer), key, value, slots, isa);
}

void paged_attention(const LayerView& layer, AttentionArgs args) {
  require_host(layer);
  const Residency::Use use = layer.use();
  args.kv = kv_view_of(layer);
  paged_attention(args);
}

}  // namespace pipelive
