#pragma once

#include <sys/types.h>

#include <map>
#include <mutex>

#include "pipelive/device/device.hpp"

namespace pipelive {

/// Host memory. All pages are ranges of one memory file (memfd), so that a page can be mapped by
/// another process and goes back to the operating system when a hole is punched in its place. A
/// page's handle is its offset in that file.
///
/// Linux limits the number of mappings of a process (vm.max_map_count, 65,530). Neighbouring pages
/// mapped side by side count as one, so create_pages hands out runs, lowest offsets first.
///
/// A forked child sees the pages that were mapped, and shares them with its parent; it cannot
/// create or destroy any.
class HostDevice final : public Device {
 public:
  /// Throws Error(device) where the system has no memfd.
  HostDevice();
  ~HostDevice() override;
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;

  [[nodiscard]] const DeviceInfo& info() const noexcept override { return info_; }
  [[nodiscard]] DeviceUsage usage() const override;
  [[nodiscard]] std::byte* reserve(std::size_t bytes, std::size_t alignment) override;
  void release(std::byte* address, std::size_t bytes) noexcept override;
  [[nodiscard]] std::vector<PageHandle> create_pages(std::size_t page_bytes,
                                                     std::size_t count) override;
  void destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) override;
  void map(std::byte* address, std::size_t page_bytes, std::span<const PageHandle> pages) override;
  void map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                    PageHandle page) override;
  void unmap(std::byte* address, std::size_t bytes) override;
  void copy(std::byte* target, const std::byte* source, std::size_t bytes,
            Stream stream = {}) override;
  void fill(std::byte* target, int value, std::size_t bytes, Stream stream = {}) override;
  [[nodiscard]] std::shared_ptr<Event> record(Stream stream = {}) override;
  void order_after(Stream stream, const std::shared_ptr<Event>& event) override;
  [[nodiscard]] ExportedPages export_page(std::size_t page_bytes, PageHandle page) override;
  [[nodiscard]] std::unique_ptr<ImportedPages> import_run(std::span<const ExportedPages> exported,
                                                          PageAccess access) override;

  /// Bytes that the operating system holds for the memory file now.
  [[nodiscard]] std::uint64_t resident_file_bytes() const;

 private:
  struct Reservation {
    std::size_t bytes = 0;
    std::map<std::size_t, std::size_t> mapped;  ///< start -> end of mapped runs, from the base
  };

  void check_page_bytes(std::size_t page_bytes) const;
  void check_process(const char* call) const;
  /// The reservation that contains the range, and the range's offset in it.
  std::pair<Reservation*, std::size_t> find(std::byte* address, std::size_t bytes,
                                            const char* call);
  void map_runs(std::byte* address, std::size_t page_bytes, std::span<const PageHandle> pages);
  void give_extent(std::uint64_t offset, std::uint64_t bytes);

  DeviceInfo info_;
  UniqueFd file_;
  const pid_t process_ = ::getpid();
  mutable std::mutex mutex_;  ///< guards everything below
  std::map<std::byte*, Reservation> reservations_;
  std::map<std::uint64_t, std::uint64_t> free_extents_;  ///< offset -> bytes, never adjacent
  std::uint64_t file_end_ = 0;                           ///< where never used offsets begin
  DeviceUsage usage_;
};

}  // namespace pipelive
