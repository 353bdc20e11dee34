#pragma once

#include <array>
#include <mutex>
#include <string_view>

#include "pipelive/base/error.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive {

/// The calls of a Device that can fail.
enum class DeviceCall : std::uint8_t {
  reserve,
  create_pages,
  destroy_pages,
  map,
  map_repeated,
  unmap,
  copy,
  fill,
  record,
  order_after,
  export_page,
  import_pages,
};
inline constexpr std::size_t kDeviceCallCount = 12;
[[nodiscard]] std::string_view to_string(DeviceCall call) noexcept;

/// Wraps any device and makes chosen calls fail, to show that what is built on top undoes its half
/// of the work. A call that fails here does not reach the wrapped device. Thread-safe.
class FaultDevice final : public Device {
 public:
  explicit FaultDevice(std::shared_ptr<Device> device);

  /// Makes the `nth` call of that kind from now on (1: the next) throw Error(code), and the
  /// `times - 1` calls of the kind after it as well. 0 disarms the kind.
  void fail(DeviceCall call, std::uint64_t nth, std::uint64_t times = 1,
            ErrorCode code = ErrorCode::device);
  /// Makes the `nth` call from now on, of whatever kind, throw. 0 disarms.
  void fail_any(std::uint64_t nth);
  void disarm();
  /// How often the kind was called, failed calls included.
  [[nodiscard]] std::uint64_t calls(DeviceCall call) const;
  [[nodiscard]] std::uint64_t total_calls() const;
  [[nodiscard]] const std::shared_ptr<Device>& wrapped() const noexcept { return device_; }

  [[nodiscard]] const DeviceInfo& info() const noexcept override { return device_->info(); }
  [[nodiscard]] DeviceUsage usage() const override { return device_->usage(); }
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
  /// Counts, and fails, as a copy for each of the jobs.
  void copy_many(std::span<const CopyJob> jobs, Stream stream = {}) override;
  void prepare_copies() override { device_->prepare_copies(); }
  void fill(std::byte* target, int value, std::size_t bytes, Stream stream = {}) override;
  [[nodiscard]] std::shared_ptr<Event> record(Stream stream = {}) override;
  void order_after(Stream stream, const std::shared_ptr<Event>& event) override;
  [[nodiscard]] std::vector<Stream> implicit_streams() const override {
    return device_->implicit_streams();
  }
  [[nodiscard]] ExportedPages export_page(std::size_t page_bytes, PageHandle page) override;
  [[nodiscard]] std::unique_ptr<ImportedPages> import_run(std::span<const ExportedPages> exported,
                                                          PageAccess access) override;

 private:
  struct Plan {
    std::uint64_t calls = 0;
    std::uint64_t first = 0;  ///< the number of the first call to fail; 0: none
    std::uint64_t last = 0;
    ErrorCode code = ErrorCode::device;
  };
  void enter(DeviceCall call);

  std::shared_ptr<Device> device_;
  mutable std::mutex mutex_;
  std::array<Plan, kDeviceCallCount> plans_{};
  Plan any_;
};

}  // namespace pipelive
