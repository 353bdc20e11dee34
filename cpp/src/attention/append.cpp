#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.hpp"

namespace pipelive {
namespace {

using attention_detail::refuse;

/// Checks every slot and returns the blocks that they lie in, each once where neighbours repeat it.
std::vector<std::int32_t> blocks_of(const KVView& kv, std::span<const std::int64_t> slots) {
  std::vector<std::int32_t> blocks;
  const std::int64_t num_slots = kv.num_blocks * kv.block_size;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::int64_t slot = slots[i];
    if (slot == -1) continue;
    if (slot < 0 || slot >= num_slots) {
      refuse("slots[" + std::to_string(i) + "]", std::to_string(slot),
             "-1 or 0 to " + std::to_string(num_slots - 1));
    }
    const auto block = static_cast<std::int32_t>(slot / kv.block_size);
    if (blocks.empty() || blocks.back() != block) blocks.push_back(block);
  }
  return blocks;
}

void validate(const KVView& kv, const TokenView& key, const TokenView& value,
              std::span<const std::int64_t> slots) {
  kv.validate(true);
  const auto num_slots = static_cast<std::int64_t>(slots.size());
  for (const auto& [view, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    attention_detail::validate_tokens(*view, name, kv);
    if (view->tokens != num_slots) {
      refuse(std::string(name) + ": number of tokens", std::to_string(view->tokens),
             std::to_string(num_slots) + " as in slots");
    }
    if (view->heads != kv.kv_heads) {
      refuse(std::string(name) + ": number of heads", std::to_string(view->heads),
             std::to_string(kv.kv_heads) + " as in kv");
    }
    if (attention_detail::range_of(*view).overlaps(attention_detail::range_of(kv))) {
      refuse(name, "memory that overlaps kv", "memory of its own");
    }
  }
}

}  // namespace

void append(const KVView& kv, const TokenView& key, const TokenView& value,
            std::span<const std::int64_t> slots, std::optional<Isa> isa) {
  const attention_detail::Kernels& kernels = attention_detail::kernels_of(isa);
  validate(kv, key, value, slots);
  const std::vector<std::int32_t> blocks = blocks_of(kv, slots);
  if (kv.require_resident && !blocks.empty()) kv.require_resident(blocks);

  const auto item = static_cast<std::int64_t>(size_of(kv.dtype));
  const auto row_bytes = static_cast<std::size_t>(kv.head_dim * item);
  const auto narrow = kernels.narrow[static_cast<int>(kv.dtype)];
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0) continue;
    const std::int64_t block = slots[i] / kv.block_size;
    const std::int64_t offset = slots[i] - block * kv.block_size;
    std::byte* const slot = kv.base + (block * kv.block_stride + offset * kv.token_stride) * item;
    for (const auto& [view, side] : {std::pair{&key, 0}, std::pair{&value, 1}}) {
      std::byte* to = slot + side * kv.kv_stride * item;
      for (std::int64_t head = 0; head < kv.kv_heads; ++head, to += kv.head_stride * item) {
        const std::byte* from = view->at(static_cast<std::int64_t>(i), head);
        if (view->dtype == kv.dtype) {
          std::memcpy(to, from, row_bytes);
        } else {
          narrow(reinterpret_cast<const float*>(from), 1.0f, to, static_cast<int>(kv.head_dim));
        }
      }
    }
  }
}

}  // namespace pipelive
