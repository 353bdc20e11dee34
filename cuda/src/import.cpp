// Pages of other processes.

#include <unistd.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

/// Takes itself apart again wherever its making stopped.
class CudaImportedPages final : public ImportedPages {
 public:
  explicit CudaImportedPages(std::shared_ptr<const PrimaryContext> context)
      : context_(std::move(context)), process_(::getpid()) {}
  CudaImportedPages(const CudaImportedPages&) = delete;
  CudaImportedPages& operator=(const CudaImportedPages&) = delete;
  ~CudaImportedPages() override {
    if (::getpid() != process_) return;
    try {
      const CallScope scope(*context_);
      const DriverApi& api = context_->driver().api();
      if (mapped_ > 0) api.mem_unmap(start_, mapped_);
      for (const AllocationHandle allocation : allocations_) api.mem_release(allocation);
      if (start_ != 0) api.mem_address_free(start_, bytes_);
    } catch (const Error&) {
      // The context is gone, and its mappings with it.
    }
  }

  void make(std::span<const ExportedPages> exported, std::size_t total, std::size_t granularity) {
    const Driver& driver = context_->driver();
    const DriverApi& api = driver.api();
    allocations_.reserve(exported.size());
    for (const ExportedPages& part : exported) {
      AllocationHandle allocation = 0;
      // The descriptor travels as the value of the pointer.
      auto* descriptor = reinterpret_cast<void*>(static_cast<std::intptr_t>(part.fd.get()));
      driver.check(api.mem_import_from_shareable_handle(&allocation, descriptor,
                                                        ShareableHandleType::posix_fd),
                   "cuMemImportFromShareableHandle");
      allocations_.push_back(allocation);
    }
    driver.check(api.mem_address_reserve(&start_, total, granularity, 0, 0),
                 "cuMemAddressReserve(" + std::to_string(total) + " bytes)");
    bytes_ = total;
    for (std::size_t i = 0; i < exported.size(); ++i) {
      driver.check(api.mem_map(start_ + mapped_, exported[i].bytes, 0, allocations_[i], 0),
                   "cuMemMap of imported pages");
      mapped_ += exported[i].bytes;
    }
  }

  [[nodiscard]] DevicePointer start() const noexcept { return start_; }
  [[nodiscard]] std::byte* data() const noexcept override {
    return reinterpret_cast<std::byte*>(start_);
  }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }
  [[nodiscard]] bool writable() const noexcept override { return writable_; }
  void set_writable() noexcept { writable_ = true; }

 private:
  const std::shared_ptr<const PrimaryContext> context_;
  const pid_t process_;
  std::vector<AllocationHandle> allocations_;
  DevicePointer start_ = 0;
  std::size_t bytes_ = 0;
  std::size_t mapped_ = 0;
  bool writable_ = false;
};

}  // namespace

std::unique_ptr<ImportedPages> CudaDevice::import_run(std::span<const ExportedPages> exported,
                                                      PageAccess access) {
  check_process("import_pages");
  if (exported.empty()) {
    throw Error(ErrorCode::invalid_argument, "import_pages: there are no pages to map");
  }
  std::size_t total = 0;
  for (const ExportedPages& part : exported) {
    if (!part.fd.valid() || part.offset != 0 || part.bytes == 0 ||
        part.bytes % info_.page_granularity != 0) {
      throw Error(ErrorCode::invalid_argument,
                  "import_pages: " + std::to_string(part.bytes) + " bytes at offset " +
                      std::to_string(part.offset) + " are no exported pages of a CUDA device");
    }
    total += part.bytes;
  }
  const CallScope scope(*context_);
  auto imported = std::make_unique<CudaImportedPages>(context_);
  imported->make(exported, total, info_.page_granularity);
  if (access == PageAccess::read) {
    try {
      set_access(imported->start(), total, MemoryAccess::read);
      return imported;
    } catch (const Error&) {
      // Not every driver knows read-only mappings; writable() tells.
    }
  }
  set_access(imported->start(), total, MemoryAccess::read_write);
  imported->set_writable();
  return imported;
}

}  // namespace pipelive::cuda
