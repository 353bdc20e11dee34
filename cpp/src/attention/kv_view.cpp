#include "pipelive/attention/kv_view.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "dispatch.hpp"
#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

struct Axis {
  const char* name;
  std::int64_t length;
  std::int64_t stride;
};

std::array<Axis, 4> axes_of(const KVView& view) {
  return {{{"block", view.num_blocks, view.block_stride},
           {"head", view.kv_heads, view.head_stride},
           {"kv", 2, view.kv_stride},
           {"token", view.block_size, view.token_stride}}};
}

}  // namespace

void KVView::validate(bool written) const {
  using attention_detail::refuse;
  if (base == nullptr) refuse("kv", "a null pointer", "memory");
  const auto in_range = [](const char* name, std::int64_t value, std::int64_t most) {
    if (value < 1 || value > most) {
      refuse(std::string("kv: ") + name, std::to_string(value), "1 to " + std::to_string(most));
    }
  };
  in_range("num_blocks", num_blocks, std::numeric_limits<std::int32_t>::max());
  in_range("kv_heads", kv_heads, 65536);
  in_range("block_size", block_size, std::numeric_limits<std::int32_t>::max());
  if (head_dim < 8 || head_dim > attention_detail::kMaxHeadDim || head_dim % 8 != 0) {
    refuse("kv: head_dim", std::to_string(head_dim), "a multiple of 8 from 8 to 256");
  }
  // Offsets are formed in 64 bits; 2^48 bytes is more than an address space holds.
  std::array<Axis, 4> axes = axes_of(*this);
  std::int64_t extent = head_dim;
  for (const Axis& axis : axes) {
    const std::int64_t most = (std::int64_t{1} << 48) / axis.length;
    if (axis.stride < 0 || axis.stride > most) {
      refuse(std::string("kv: ") + axis.name + " stride", std::to_string(axis.stride),
             "0 to " + std::to_string(most) + " elements");
    }
  }
  if (!written) return;
  std::ranges::sort(axes, {}, &Axis::stride);
  for (const Axis& axis : axes) {
    if (axis.length == 1) continue;
    if (axis.stride < extent) {
      refuse(std::string("kv: ") + axis.name + " stride", std::to_string(axis.stride),
             "at least " + std::to_string(extent) + ", so that no two elements share an address");
    }
    extent = axis.stride * (axis.length - 1) + extent;
  }
}

namespace attention_detail {

void refuse(const std::string& name, const std::string& value, const std::string& expected) {
  throw Error(ErrorCode::invalid_argument, name + " is " + value + ", expected " + expected);
}

AddressRange range_of(const TokenView& view) noexcept {
  if (view.tokens == 0 || view.heads == 0) return {};
  const std::int64_t last =
      (view.tokens - 1) * view.token_stride + (view.heads - 1) * view.head_stride + view.head_dim;
  return {view.data, view.data + last * static_cast<std::int64_t>(size_of(view.dtype))};
}

AddressRange range_of(const KVView& view) noexcept {
  std::int64_t last = view.head_dim;
  for (const Axis& axis : axes_of(view)) last += (axis.length - 1) * axis.stride;
  return {view.base, view.base + last * static_cast<std::int64_t>(size_of(view.dtype))};
}

void validate_tokens(const TokenView& view, const char* name, const KVView& kv) {
  const std::string argument(name);
  if (view.tokens < 0 || view.tokens > std::numeric_limits<std::int32_t>::max()) {
    refuse(argument + ": number of tokens", std::to_string(view.tokens), "0 to 2^31 - 1");
  }
  if (view.heads < 1 || view.heads > 65536) {
    refuse(argument + ": number of heads", std::to_string(view.heads), "1 to 65536");
  }
  if (view.head_dim != kv.head_dim) {
    refuse(argument + ": head_dim", std::to_string(view.head_dim),
           std::to_string(kv.head_dim) + " as in kv");
  }
  if (view.tokens > 0 && view.data == nullptr) refuse(argument, "a null pointer", "memory");
  if (view.dtype != kv.dtype && view.dtype != DType::float32) {
    refuse(argument + ": dtype", std::string(to_string(view.dtype)),
           std::string(to_string(kv.dtype)) +
               (kv.dtype == DType::float32 ? " as in kv" : " as in kv, or float32"));
  }
  const std::int64_t most = std::int64_t{1} << 30;
  if (view.token_stride < 0 || view.token_stride > most) {
    refuse(argument + ": stride of tokens", std::to_string(view.token_stride),
           "0 to 2^30 elements");
  }
  if (view.head_stride < 0 || view.head_stride > most) {
    refuse(argument + ": stride of heads", std::to_string(view.head_stride), "0 to 2^30 elements");
  }
}

}  // namespace attention_detail
}  // namespace pipelive
