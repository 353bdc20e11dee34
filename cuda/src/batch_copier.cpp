#include "pipelive/cuda/batch_copier.hpp"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "device_text.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/copy_math.hpp"
#include "pipelive/cuda/pinned_buffer.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

// Fewer copies cost less by themselves than a table of them.
constexpr std::size_t kFewest = 16;
// What takes the device longer than the call takes the host.
constexpr std::size_t kLong = std::size_t{1} << 20;
constexpr std::size_t kLeastTable = std::size_t{64} << 10;
constexpr double kEndSeconds = 60.0;

bool is_short(const CopyJob& job) {
  const DevicePointer bits = pointer(job.to) | pointer(job.from) | job.bytes;
  return job.bytes <= kLong && bits % sizeof(Vector16) == 0;
}

std::size_t pieces(const CopyJob& job) {
  return (job.bytes + kCopyManyBytes - 1) / kCopyManyBytes;
}

}  // namespace

struct BatchCopier::Table {
  Table(const Driver& driver, std::size_t bytes) : host(driver, bytes), device(driver, bytes) {}

  PinnedBuffer host;
  DeviceBuffer device;
  std::shared_ptr<Event> last_use;  ///< null: not known, and so not over
};

BatchCopier::BatchCopier(std::shared_ptr<const PrimaryContext> context,
                         std::shared_ptr<EventPool> events, Kernels::ImageSource images)
    : context_(std::move(context)), events_(std::move(events)), images_(std::move(images)) {}

BatchCopier::~BatchCopier() {
  // What does not come to an end, or cannot be asked, keeps what it reads.
  const Deadline deadline = Deadline::after_seconds(kEndSeconds);
  for (auto& table : tables_) {
    try {
      if (table->last_use != nullptr) {
        table->last_use->wait(deadline);
        continue;
      }
    } catch (const Error&) {
      // Below.
    }
    static_cast<void>(table.release());
    static_cast<void>(kernels_.release());
  }
  try {
    const CallScope scope(*context_);
    tables_.clear();
    kernels_.reset();
  } catch (const Error&) {
    for (auto& table : tables_) static_cast<void>(table.release());  // the context is gone
  }
}

FunctionHandle BatchCopier::kernel() {
  if (!looked_for_) {
    looked_for_ = true;  // once: looking may mean compiling
    try {
      auto kernels = std::make_unique<Kernels>(context_, images_);
      kernel_ = kernels->function({"copy_many", {}}, "pipelive_copy_many", 0);
      kernels_ = std::move(kernels);
    } catch (const Error&) {
      // Copies one by one are slower, and right.
    }
  }
  return kernel_;
}

// One that nothing uses any more, or a new one. It stays the caller's to put back: where a call
// fails half-way a copy may be reading it, and it is not used again.
std::unique_ptr<BatchCopier::Table> BatchCopier::take_table(std::size_t bytes) {
  for (auto& table : tables_) {
    if (table->last_use == nullptr || !table->last_use->done()) continue;
    std::swap(table, tables_.back());
    std::unique_ptr<Table> found = std::move(tables_.back());
    tables_.pop_back();
    found->last_use.reset();
    if (found->host.bytes() >= bytes) return found;
    break;  // too small: a larger one takes its place
  }
  return std::make_unique<Table>(context_->driver(), std::bit_ceil(std::max(bytes, kLeastTable)));
}

void BatchCopier::launch(std::span<const CopyJob* const> jobs, std::size_t entries,
                         StreamHandle stream) {
  const Driver& driver = context_->driver();
  const std::size_t bytes = entries * sizeof(CopyEntry);
  tables_.push_back(take_table(bytes));
  Table* const table = tables_.back().get();
  auto* entry = reinterpret_cast<CopyEntry*>(table->host.data());
  for (const CopyJob* job : jobs) {
    for (std::size_t done = 0; done < job->bytes; done += kCopyManyBytes) {
      const std::size_t part = std::min<std::size_t>(job->bytes - done, kCopyManyBytes);
      *entry++ = {pointer(job->to) + done, pointer(job->from) + done,
                  static_cast<u32>(part / sizeof(Vector16)), 0};
    }
  }
  driver.check(driver.api().memcpy_to_device_async(table->device.pointer(), table->host.data(),
                                                   bytes, stream),
               "cuMemcpyHtoDAsync(" + bytes_text(bytes) + ")");
  CopyManyArgs args{table->device.pointer()};
  void* parameters[] = {&args};
  driver.check(driver.api().launch_kernel(kernel_, static_cast<unsigned>(entries), 1, 1,
                                          kCopyManyThreads, 1, 1, 0, stream, parameters, nullptr),
               "cuLaunchKernel(pipelive_copy_many)");
  table->last_use = events_->record(stream);
}

void BatchCopier::prepare() {
  const std::lock_guard lock(mutex_);
  static_cast<void>(kernel());
}

void BatchCopier::copy(std::span<const CopyJob> jobs, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  std::vector<const CopyJob*> short_ones;
  std::size_t entries = 0;
  if (jobs.size() >= kFewest) {
    for (const CopyJob& job : jobs) {
      if (!is_short(job) || job.bytes == 0) continue;
      short_ones.push_back(&job);
      entries += pieces(job);
    }
  }
  const bool batched = short_ones.size() >= kFewest && kernel() != nullptr;
  if (batched) launch(short_ones, entries, stream);
  const DriverApi& api = context_->driver().api();
  for (const CopyJob& job : jobs) {
    if (job.bytes == 0 || (batched && is_short(job))) continue;
    context_->driver().check(
        api.memcpy_async(pointer(job.to), pointer(job.from), job.bytes, stream),
        "cuMemcpyAsync(" + bytes_text(job.bytes) + ")");
  }
}

}  // namespace pipelive::cuda
