#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "pipelive/attention/attention.hpp"
#include "pipelive/kv/layer_view.hpp"

namespace pipelive {

/// The layer's blocks for the kernels, residency checks included. Whoever uses it holds
/// `layer.use()` meanwhile. For memory of any device; nothing is touched.
[[nodiscard]] KVView kv_view_of(const LayerView& layer);

/// append to a layer of a pool, whose blocks stay where they are meanwhile. Throws moreover
/// Error(closed) where the pool was closed.
void append(const LayerView& layer, const TokenView& key, const TokenView& value,
            std::span<const std::int64_t> slots, std::optional<Isa> isa = std::nullopt);

/// paged_attention over a layer of a pool; `args.kv` is filled in here.
void paged_attention(const LayerView& layer, AttentionArgs args);

}  // namespace pipelive
