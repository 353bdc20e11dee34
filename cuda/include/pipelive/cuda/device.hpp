#pragma once

#include <sys/types.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "pipelive/cuda/batch_copier.hpp"
#include "pipelive/cuda/driver.hpp"
#include "pipelive/cuda/event_pool.hpp"
#include "pipelive/cuda/stream.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// The memory of one NVIDIA GPU, by the driver's virtual memory management, in the primary context
/// that torch and cupy use as well. Works from any thread and leaves the thread's current context
/// as it was.
///
/// Every page is an allocation of its own, which can be exported as a file descriptor and, where
/// the device says so, used for GPUDirect RDMA. A page's handle is a number of ours that is never
/// used twice. New pages hold whatever the driver left in them (info().zeroed_pages is false).
///
/// A null stream is a non-blocking stream of the device object; the legacy default stream is
/// kDefaultStream. A forked child cannot use the device: calls throw, destructors do nothing.
class CudaDevice final : public Device {
 public:
  /// Throws Error(device) that names the missing driver, symbol or ability, Error(invalid_argument)
  /// where there is no device of that number.
  explicit CudaDevice(int ordinal, const std::string& library = std::string(kDriverLibrary));
  /// `images` gives the code of the kernel that makes many copies; see Kernels.
  CudaDevice(std::shared_ptr<const Driver> driver, int ordinal, Kernels::ImageSource images = {});
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  [[nodiscard]] const std::shared_ptr<const PrimaryContext>& context() const noexcept {
    return context_;
  }
  [[nodiscard]] const Driver& driver() const noexcept { return context_->driver(); }
  [[nodiscard]] const std::shared_ptr<EventPool>& events() const noexcept { return events_; }
  /// Whether pages can be exported, and whether they were made for GPUDirect RDMA.
  [[nodiscard]] bool exportable() const noexcept {
    return properties_.handle_types == ShareableHandleType::posix_fd;
  }
  [[nodiscard]] bool rdma() const noexcept { return properties_.flags.rdma_capable != 0; }
  struct Memory {
    std::size_t free = 0;
    std::size_t total = 0;
  };
  /// Of the whole device, in bytes, whoever uses it.
  [[nodiscard]] Memory memory() const;

  [[nodiscard]] const DeviceInfo& info() const noexcept override { return info_; }
  [[nodiscard]] DeviceUsage usage() const override;
  [[nodiscard]] std::byte* reserve(std::size_t bytes, std::size_t alignment) override;
  void release(std::byte* address, std::size_t bytes) noexcept override;
  [[nodiscard]] std::vector<PageHandle> create_pages(std::size_t page_bytes,
                                                     std::size_t count) override;
  /// Should the driver refuse one of several, those released before it are made anew: their bytes
  /// are lost then.
  void destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) override;
  void map(std::byte* address, std::size_t page_bytes, std::span<const PageHandle> pages) override;
  void map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                    PageHandle page) override;
  /// Only whole pages, as they were mapped.
  void unmap(std::byte* address, std::size_t bytes) override;
  /// Either side may be memory of the host; pageable memory may be read or written before the call
  /// returns, or be needed until the stream has come so far.
  void copy(std::byte* target, const std::byte* source, std::size_t bytes,
            Stream stream = {}) override;
  /// Short copies by one launch of a kernel, where there is one for the device. Throws Error(busy)
  /// for a stream that is being captured into a graph.
  void copy_many(std::span<const CopyJob> jobs, Stream stream = {}) override;
  void prepare_copies() override;
  void fill(std::byte* target, int value, std::size_t bytes, Stream stream = {}) override;
  /// Both throw Error(busy) for a stream that is being captured into a graph.
  [[nodiscard]] std::shared_ptr<Event> record(Stream stream = {}) override;
  void order_after(Stream stream, const std::shared_ptr<Event>& event) override;
  [[nodiscard]] std::vector<Stream> implicit_streams() const override { return {kDefaultStream}; }
  [[nodiscard]] ExportedPages export_page(std::size_t page_bytes, PageHandle page) override;
  /// Maps pages of any process and of any device that this one can reach. Where the driver knows no
  /// read-only mappings, PageAccess::read maps them writable.
  [[nodiscard]] std::unique_ptr<ImportedPages> import_run(std::span<const ExportedPages> exported,
                                                          PageAccess access) override;

 private:
  struct Page {
    AllocationHandle allocation = 0;
    std::size_t bytes = 0;
    std::size_t mappings = 0;
  };
  struct Mapping {
    std::size_t bytes = 0;
    PageHandle page = kNoPage;
  };
  struct Reservation {
    std::size_t bytes = 0;
    DevicePointer start = 0;  ///< what the driver gave, before alignment
    std::size_t start_bytes = 0;
    std::map<std::size_t, Mapping> mapped;  ///< by offset
  };

  void check_process(const char* call) const;
  void check_page_bytes(std::size_t page_bytes) const;
  void choose_properties();
  [[nodiscard]] int attribute(DeviceAttribute attribute) const;
  [[nodiscard]] Page& find_page(const char* call, std::size_t page_bytes, PageHandle page);
  std::pair<Reservation*, std::size_t> find(std::byte* address, std::size_t bytes,
                                            const char* call);
  void forget_mappings(Reservation& reservation, std::size_t offset, std::size_t bytes) noexcept;
  void set_access(DevicePointer pointer, std::size_t bytes, MemoryAccess access) const;
  [[nodiscard]] StreamHandle native(Stream stream) const noexcept;

  const std::shared_ptr<const PrimaryContext> context_;
  const pid_t process_;
  DeviceInfo info_;
  std::size_t total_bytes_ = 0;  ///< of the device's memory
  AllocationProperties properties_;
  std::shared_ptr<EventPool> events_;
  std::unique_ptr<OwnStream> own_;
  std::unique_ptr<BatchCopier> copier_;

  // Guards the books; the driver is called without it, since that can take long.
  mutable std::mutex mutex_;
  std::map<std::byte*, Reservation> reservations_;
  std::unordered_map<PageHandle, Page> pages_;
  PageHandle next_page_ = 0;
  DeviceUsage usage_;
};

}  // namespace pipelive::cuda
