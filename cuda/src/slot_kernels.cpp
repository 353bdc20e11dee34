#include "pipelive/cuda/slot_kernels.hpp"

#include <array>
#include <bit>
#include <map>
#include <mutex>
#include <string>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/crc_math.hpp"
#include "pipelive/cuda/fatbin.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {

struct SlotKernels::Modules {
  Modules(const Driver& driver, const Images& images)
      : append(driver, images.append),
        copy(driver, images.copy),
        marks(driver, images.marks),
        tables(driver, sizeof(CrcTables)) {}

  Module append;
  Module copy;
  Module marks;
  DeviceBuffer tables;
  std::array<FunctionHandle, 5> append_raw{};  // by the logarithm of the bytes
  std::array<FunctionHandle, 5> gather{};
  std::array<FunctionHandle, 5> scatter{};
  std::array<std::array<FunctionHandle, 2>, 2> narrow{};  // by bfloat16, four
};

namespace {

FunctionHandle by_bytes(const std::array<FunctionHandle, 5>& kernels, unsigned bytes) {
  const auto place = static_cast<std::size_t>(std::countr_zero(bytes));
  if (!std::has_single_bit(bytes) || place >= kernels.size() || kernels[place] == nullptr) {
    throw Error(ErrorCode::invalid_argument,
                "there is no kernel that moves " + std::to_string(bytes) + " bytes at a time");
  }
  return kernels[place];
}

}  // namespace

namespace {

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
  const Images images{fatbin("slots_append").bytes, fatbin("slots_copy").bytes,
                      fatbin("slots_marks").bytes};
  entry = std::make_shared<const SlotKernels>(context, images);
  return entry;
}

SlotKernels::SlotKernels(std::shared_ptr<const PrimaryContext> context, const Images& images)
    : context_(std::move(context)) {
  const CallScope scope(*context_);
  const Driver& driver = context_->driver();
  auto modules = std::make_unique<Modules>(driver, images);
  for (const unsigned bytes : {1U, 2U, 4U, 8U, 16U}) {
    const auto place = static_cast<std::size_t>(std::countr_zero(bytes));
    const std::string suffix = "_" + std::to_string(bytes);
    modules->gather[place] = modules->copy.function("pipelive_gather" + suffix);
    modules->scatter[place] = modules->copy.function("pipelive_scatter" + suffix);
    if (bytes == 1 || bytes == 8) continue;
    modules->append_raw[place] = modules->append.function("pipelive_append" + suffix);
  }
  for (const bool bfloat16 : {false, true}) {
    const std::string name = bfloat16 ? "pipelive_append_bfloat16_" : "pipelive_append_float16_";
    modules->narrow[bfloat16 ? 1 : 0] = {modules->append.function(name + "1"),
                                         modules->append.function(name + "4")};
  }
  crc_tiles = modules->copy.function("pipelive_crc_tiles");
  marks_take = modules->marks.function("pipelive_marks_take");
  marks_fold = modules->marks.function("pipelive_marks_fold");
  marks_emit = modules->marks.function("pipelive_marks_emit");
  const auto tables = std::make_unique<CrcTables>();
  fill_crc_tables(*tables);
  driver.check(
      driver.api().memcpy_to_device(modules->tables.pointer(), tables.get(), sizeof(CrcTables)),
      "cuMemcpyHtoD");
  modules_ = std::move(modules);
}

SlotKernels::~SlotKernels() {
  try {
    const CallScope scope(*context_);
    modules_.reset();
  } catch (const Error&) {
    // The context is gone, and what was in it.
  }
}

FunctionHandle SlotKernels::append(unsigned bytes) const {
  return by_bytes(modules_->append_raw, bytes);
}
FunctionHandle SlotKernels::append_narrow(bool bfloat16, bool four) const noexcept {
  return modules_->narrow[bfloat16 ? 1 : 0][four ? 1 : 0];
}
FunctionHandle SlotKernels::gather(unsigned bytes) const {
  return by_bytes(modules_->gather, bytes);
}
FunctionHandle SlotKernels::scatter(unsigned bytes) const {
  return by_bytes(modules_->scatter, bytes);
}
DevicePointer SlotKernels::crc_tables() const noexcept {
  return modules_->tables.pointer();
}

void SlotKernels::launch_raw(FunctionHandle kernel, std::string_view name, std::uint64_t blocks,
                             unsigned threads, StreamHandle stream, const void* args) const {
  constexpr std::uint64_t kMostBlocks = 0x7FFFFFFF;
  if (blocks == 0 || blocks > kMostBlocks) {
    throw Error(ErrorCode::invalid_argument, std::string(name) + " with " + std::to_string(blocks) +
                                                 " blocks of threads, expected 1 to 2^31 - 1");
  }
  void* parameters[] = {const_cast<void*>(args)};
  context_->driver().check(
      context_->driver().api().launch_kernel(kernel, static_cast<unsigned>(blocks), 1, 1, threads,
                                             1, 1, 0, stream, parameters, nullptr),
      "cuLaunchKernel(" + std::string(name) + ")");
}

}  // namespace pipelive::cuda
