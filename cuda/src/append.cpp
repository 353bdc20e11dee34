#include "pipelive/cuda/append.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/append_math.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& value,
                         const std::string& expected) {
  throw Error(ErrorCode::invalid_argument, name + " is " + value + ", expected " + expected);
}

std::uint64_t address(const std::byte* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

// The address behind the last element.
std::uint64_t end_of(const TokenView& view) {
  if (view.tokens == 0 || view.heads == 0) return address(view.data);
  const std::int64_t last =
      (view.tokens - 1) * view.token_stride + (view.heads - 1) * view.head_stride + view.head_dim;
  return address(view.data) + static_cast<std::uint64_t>(last) * size_of(view.dtype);
}

std::uint64_t end_of(const KVView& kv) {
  const std::int64_t last = (kv.num_blocks - 1) * kv.block_stride +
                            (kv.kv_heads - 1) * kv.head_stride + kv.kv_stride +
                            (kv.block_size - 1) * kv.token_stride + kv.head_dim;
  return address(kv.base) + static_cast<std::uint64_t>(last) * size_of(kv.dtype);
}

void check_tokens(const TokenView& view, const std::string& name, const KVView& kv,
                  std::int64_t num_slots) {
  if (view.tokens != num_slots) {
    refuse(name + ": number of tokens", std::to_string(view.tokens),
           std::to_string(num_slots) + " as in slots");
  }
  if (view.heads != kv.kv_heads) {
    refuse(name + ": number of heads", std::to_string(view.heads),
           std::to_string(kv.kv_heads) + " as in kv");
  }
  if (view.head_dim != kv.head_dim) {
    refuse(name + ": head_dim", std::to_string(view.head_dim),
           std::to_string(kv.head_dim) + " as in kv");
  }
  if (view.tokens > 0 && view.data == nullptr) refuse(name, "a null pointer", "memory");
  if (view.dtype != kv.dtype && view.dtype != DType::float32) {
    refuse(name + ": dtype", std::string(to_string(view.dtype)),
           std::string(to_string(kv.dtype)) +
               (kv.dtype == DType::float32 ? " as in kv" : " as in kv, or float32"));
  }
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  for (const auto& [stride, axis] :
       {std::pair{view.token_stride, "tokens"}, std::pair{view.head_stride, "heads"}}) {
    if (stride < 0 || stride > kMost) {
      refuse(name + ": stride of " + axis, std::to_string(stride), "0 to 2^30 elements");
    }
  }
  if (view.tokens > 0 && address(view.data) < end_of(kv) && address(kv.base) < end_of(view)) {
    refuse(name, "memory that overlaps kv", "memory of its own");
  }
}

struct Choice {
  FunctionHandle kernel = nullptr;
  u32 numbers = 1;  // elements that one thread moves
};

// The widest kernel that every address and stride allows. `from` and `to` are the bits of all
// addresses and strides, in bytes, or-ed together.
Choice choose(const SlotKernels& kernels, const KVView& kv, DType source, u64 from, u64 to) {
  if (source == kv.dtype) {
    for (const unsigned bytes : {16U, 4U}) {
      if ((from | to) % bytes == 0) {
        return {kernels.append(bytes), static_cast<u32>(bytes / size_of(kv.dtype))};
      }
    }
    return {kernels.append(2), 1};  // float32 is aligned to 4, see below
  }
  const bool four = from % 16 == 0 && to % 8 == 0;
  return {kernels.append_narrow(kv.dtype == DType::bfloat16, four), four ? 4U : 1U};
}

}  // namespace

void append(const SlotKernels& kernels, const KVView& kv, const TokenView& key,
            const TokenView& value, DevicePointer slots, std::int64_t num_slots,
            StreamHandle stream, const DeviceMarks* marks) {
  kv.validate(true);
  if (num_slots < 0 || num_slots > std::numeric_limits<std::int32_t>::max()) {
    refuse("slots: length", std::to_string(num_slots), "0 to 2^31 - 1");
  }
  check_tokens(key, "key", kv, num_slots);
  check_tokens(value, "value", kv, num_slots);
  if (key.dtype != value.dtype) {
    refuse("value: dtype", std::string(to_string(value.dtype)),
           std::string(to_string(key.dtype)) + " as in key");
  }
  const auto kv_slots = static_cast<std::uint64_t>(kv.num_blocks * kv.block_size);
  if (marks != nullptr && marks->num_slots() < kv_slots) {
    refuse("marks: number of slots", std::to_string(marks->num_slots()),
           "at least " + std::to_string(kv_slots) + ", as kv has");
  }
  if (num_slots == 0) return;
  if (slots == 0 || slots % sizeof(i64) != 0) {
    refuse("slots", slots == 0 ? "a null pointer" : "misaligned", "int64 memory of the device");
  }

  const auto item = static_cast<i64>(size_of(kv.dtype));
  const auto source = static_cast<i64>(size_of(key.dtype));
  AppendArgs args{};
  args.kv = address(kv.base);
  args.block_stride = kv.block_stride * item;
  args.head_stride = kv.head_stride * item;
  args.kv_stride = kv.kv_stride * item;
  args.token_stride = kv.token_stride * item;
  args.key_token_stride = key.token_stride * source;
  args.key_head_stride = key.head_stride * source;
  args.value_token_stride = value.token_stride * source;
  args.value_head_stride = value.head_stride * source;
  args.num_slots = kv_slots;
  args.heads = static_cast<u32>(kv.kv_heads);
  args.block_size = static_cast<u32>(kv.block_size);
  if (marks != nullptr) {
    const DeviceMarks::Target target = marks->target();
    args.marks = target.words;
    args.set_words = target.set_words;
    args.set = target.set;
    args.skipped = target.skipped;
  }
  const u64 from = address(key.data) | address(value.data) |
                   static_cast<u64>(args.key_token_stride | args.key_head_stride |
                                    args.value_token_stride | args.value_head_stride);
  const u64 to = args.kv | static_cast<u64>(args.block_stride | args.head_stride | args.kv_stride |
                                            args.token_stride);
  if (from % size_of(key.dtype) != 0) refuse("key or value", "misaligned", "whole elements");
  if (to % size_of(kv.dtype) != 0) refuse("kv", "misaligned", "whole elements");
  const Choice choice = choose(kernels, kv, key.dtype, from, to);
  args.row_items = static_cast<u32>(kv.head_dim) / choice.numbers;
  args.token_shift = shift_of(2 * args.heads * args.row_items);
  args.row_shift = shift_of(args.row_items);
  args.block_shift = shift_of(args.block_size);

  const std::int64_t token_items = 2 * kv.kv_heads * args.row_items;
  const std::int64_t most_tokens = std::numeric_limits<std::int32_t>::max() / token_items;
  const CallScope scope(*kernels.context());
  for (std::int64_t done = 0; done < num_slots; done += most_tokens) {
    const std::int64_t tokens = std::min(most_tokens, num_slots - done);
    args.items = static_cast<u32>(tokens * token_items);
    args.key = address(key.data) + static_cast<u64>(done * args.key_token_stride);
    args.value = address(value.data) + static_cast<u64>(done * args.value_token_stride);
    args.slots = slots + static_cast<u64>(done) * sizeof(i64);
    kernels.launch(choice.kernel, "pipelive_append",
                   (std::uint64_t{args.items} + kAppendThreads - 1) / kAppendThreads,
                   kAppendThreads, stream, args);
  }
}

void append(const SlotKernels& kernels, const LayerView& layer, const TokenView& key,
            const TokenView& value, DevicePointer slots, std::int64_t num_slots,
            StreamHandle stream, const DeviceMarks* marks,
            const std::shared_ptr<void>& stream_owner) {
  if (layer.device_kind() != DeviceKind::cuda) refuse("kv", "in host memory", "memory of a GPU");
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
  // For as long as the launch takes a resize waits for this; after it, for the stream.
  const Residency::Use use = layer.use();
  layer.check_resident_range(0, 1);
  const Stream user = stream == nullptr ? kDefaultStream : Stream{stream};
  layer.blocks()->residency().note_stream(user, stream_owner);
  append(kernels, view, key, value, slots, num_slots, static_cast<StreamHandle>(user.handle),
         marks);
}

}  // namespace pipelive::cuda
