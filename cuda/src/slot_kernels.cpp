#include "pipelive/cuda/slot_kernels.hpp"

#include <bit>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/crc_math.hpp"
#include "pipelive/cuda/pinned_buffer.hpp"
#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/stream.hpp"

namespace pipelive::cuda {

namespace {

FunctionHandle by_bytes(const std::array<FunctionHandle, 5>& kernels, unsigned bytes) {
  const auto place = static_cast<std::size_t>(std::countr_zero(bytes));
  if (!std::has_single_bit(bytes) || place >= kernels.size() || kernels[place] == nullptr) {
    throw Error(ErrorCode::invalid_argument,
                "there is no kernel that moves " + std::to_string(bytes) + " bytes at a time");
  }
  return kernels[place];
}

// By the driver's context; kernels hold it, so that its handle names no other one. Never destroyed:
// the driver may be gone when a process ends.
struct Loaded {
  std::mutex mutex;
  std::map<ContextHandle, std::shared_ptr<const SlotKernels>> kernels;
};
Loaded& loaded() {
  static auto& instance = *new Loaded;
  return instance;
}

}  // namespace

void SlotKernels::forget() {
  const std::lock_guard lock(loaded().mutex);
  loaded().kernels.clear();
}

std::shared_ptr<const SlotKernels> SlotKernels::of(
    const std::shared_ptr<const PrimaryContext>& context) {
  const std::lock_guard lock(loaded().mutex);
  std::shared_ptr<const SlotKernels>& entry = loaded().kernels[context->handle()];
  if (entry) return entry;
  entry = std::make_shared<const SlotKernels>(Kernels::of(context));
  return entry;
}

SlotKernels::SlotKernels(std::shared_ptr<Kernels> kernels) : kernels_(std::move(kernels)) {
  const CallScope scope(*context());
  const KernelFile append_file{"slots_append", {}};
  const KernelFile copy_file{"slots_copy", {}};
  const KernelFile marks_file{"slots_marks", {}};
  const auto load = [this](const KernelFile& file, const std::string& name) {
    return kernels_->function(file, "pipelive_" + name, 0);
  };
  for (const unsigned bytes : {1U, 2U, 4U, 8U, 16U}) {
    const auto place = static_cast<std::size_t>(std::countr_zero(bytes));
    const std::string suffix = "_" + std::to_string(bytes);
    gather_[place] = load(copy_file, "gather" + suffix);
    scatter_[place] = load(copy_file, "scatter" + suffix);
    if (bytes == 1 || bytes == 8) continue;
    append_raw_[place] = load(append_file, "append" + suffix);
  }
  for (const bool bfloat16 : {false, true}) {
    const std::string name = bfloat16 ? "append_bfloat16_" : "append_float16_";
    narrow_[bfloat16 ? 1 : 0] = {load(append_file, name + "1"), load(append_file, name + "4")};
  }
  crc_tiles = load(copy_file, "crc_tiles");
  marks_take = load(marks_file, "marks_take");
  marks_fold = load(marks_file, "marks_fold");
  marks_emit = load(marks_file, "marks_emit");
  // A plain copy would go by the default stream: behind all that a model has given to it, and not
  // at all while a stream that waits for it is captured into a graph.
  const Driver& driver = kernels_->driver();
  const OwnStream stream(context());
  auto buffer = std::make_unique<DeviceBuffer>(driver, sizeof(CrcTables));
  const PinnedBuffer tables(driver, sizeof(CrcTables));
  fill_crc_tables(*new (tables.data()) CrcTables);
  driver.check(driver.api().memcpy_to_device_async(buffer->pointer(), tables.data(),
                                                   sizeof(CrcTables), stream.handle()),
               "cuMemcpyHtoDAsync");
  driver.check(driver.api().stream_synchronize(stream.handle()), "cuStreamSynchronize");
  tables_ = std::move(buffer);
}

SlotKernels::~SlotKernels() {
  try {
    const CallScope scope(*context());
    tables_.reset();
  } catch (const Error&) {
    // The context is gone, and what was in it.
  }
}

FunctionHandle SlotKernels::append(unsigned bytes) const {
  return by_bytes(append_raw_, bytes);
}
FunctionHandle SlotKernels::append_narrow(bool bfloat16, bool four) const noexcept {
  return narrow_[bfloat16 ? 1 : 0][four ? 1 : 0];
}
FunctionHandle SlotKernels::gather(unsigned bytes) const {
  return by_bytes(gather_, bytes);
}
FunctionHandle SlotKernels::scatter(unsigned bytes) const {
  return by_bytes(scatter_, bytes);
}
DevicePointer SlotKernels::crc_tables() const noexcept {
  return tables_->pointer();
}

void SlotKernels::launch_raw(FunctionHandle kernel, std::string_view name, std::uint64_t blocks,
                             unsigned threads, StreamHandle stream, const void* args) const {
  constexpr std::uint64_t kMostBlocks = 0x7FFFFFFF;
  if (blocks == 0 || blocks > kMostBlocks) {
    throw Error(ErrorCode::invalid_argument, std::string(name) + " with " + std::to_string(blocks) +
                                                 " blocks of threads, expected 1 to 2^31 - 1");
  }
  void* parameters[] = {const_cast<void*>(args)};
  kernels_->driver().check(
      kernels_->driver().api().launch_kernel(kernel, static_cast<unsigned>(blocks), 1, 1, threads,
                                             1, 1, 0, stream, parameters, nullptr),
      "cuLaunchKernel(" + std::string(name) + ")");
}

}  // namespace pipelive::cuda
