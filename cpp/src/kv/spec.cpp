#include "pipelive/kv/spec.hpp"

#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {

std::size_t size_of(DType dtype) noexcept {
  return dtype == DType::float32 ? 4 : 2;
}

std::string_view to_string(DType dtype) noexcept {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
  }
  return "unknown";
}

void KVSpec::validate() const {
  const auto check = [](const char* name, std::uint32_t value, std::uint32_t most) {
    if (value < 1 || value > most) {
      throw Error(ErrorCode::invalid_argument, std::string("KVSpec.") + name + " is " +
                                                   std::to_string(value) + ", expected 1 to " +
                                                   std::to_string(most));
    }
  };
  check("num_kv_heads", num_kv_heads, 1024);
  check("head_dim", head_dim, 4096);
  check("block_size", block_size, 4096);
}

std::size_t KVSpec::block_bytes() const noexcept {
  return std::size_t{2} * num_kv_heads * head_dim * block_size * size_of(dtype);
}

BlockLayout KVSpec::layout() const {
  validate();
  BlockLayout layout;
  layout.block_size = block_size;
  layout.block_bytes = block_bytes();
  layout.fragment_bytes = head_dim * size_of(dtype);
  const std::size_t head_bytes = layout.fragment_bytes;
  const bool hnd = order == BlockOrder::hnd;
  layout.token_stride = hnd ? head_bytes : head_bytes * num_kv_heads;
  layout.fragment_offsets.reserve(std::size_t{2} * num_kv_heads);
  for (std::size_t head = 0; head < num_kv_heads; ++head) {
    for (std::size_t kv = 0; kv < 2; ++kv) {
      layout.fragment_offsets.push_back(hnd ? (head * 2 + kv) * block_size * head_bytes
                                            : kv * block_size * num_kv_heads * head_bytes +
                                                  head * head_bytes);
    }
  }
  return layout;
}

}  // namespace pipelive
