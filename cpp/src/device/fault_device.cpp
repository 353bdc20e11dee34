#include "pipelive/device/fault_device.hpp"

#include <string>
#include <utility>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

constexpr double kDrainSeconds = 10.0;

}  // namespace

std::string_view to_string(DeviceCall call) noexcept {
  constexpr std::array<std::string_view, kDeviceCallCount> names{
      "reserve", "create_pages", "destroy_pages", "map",         "map_repeated", "unmap",
      "copy",    "fill",         "record",        "order_after", "export_page",  "import_pages"};
  return names.at(static_cast<std::size_t>(call));
}

FaultDevice::FaultDevice(std::shared_ptr<Device> device) : device_(std::move(device)) {
  if (device_ == nullptr) {
    throw Error(ErrorCode::invalid_argument, "FaultDevice: device is null, expected a device");
  }
}

void FaultDevice::fail(DeviceCall call, std::uint64_t nth, std::uint64_t times, ErrorCode code) {
  const std::lock_guard lock(mutex_);
  Plan& plan = plans_.at(static_cast<std::size_t>(call));
  plan.first = nth == 0 ? 0 : plan.calls + nth;
  plan.last = nth == 0 ? 0 : plan.first + times - 1;
  plan.code = code;
}

void FaultDevice::fail_any(std::uint64_t nth) {
  const std::lock_guard lock(mutex_);
  any_.first = nth == 0 ? 0 : any_.calls + nth;
  any_.last = any_.first;
}

void FaultDevice::disarm() {
  const std::lock_guard lock(mutex_);
  for (Plan& plan : plans_) plan.first = plan.last = 0;
  any_.first = any_.last = 0;
}

std::uint64_t FaultDevice::calls(DeviceCall call) const {
  const std::lock_guard lock(mutex_);
  return plans_.at(static_cast<std::size_t>(call)).calls;
}

std::uint64_t FaultDevice::total_calls() const {
  const std::lock_guard lock(mutex_);
  return any_.calls;
}

void FaultDevice::enter(DeviceCall call) {
  const std::lock_guard lock(mutex_);
  Plan& plan = plans_.at(static_cast<std::size_t>(call));
  ++plan.calls;
  ++any_.calls;
  const auto hit = [](const Plan& p) {
    return p.first != 0 && p.calls >= p.first && p.calls <= p.last;
  };
  if (hit(plan) || hit(any_)) {
    throw Error(hit(plan) ? plan.code : ErrorCode::device,
                "injected failure of " + std::string(to_string(call)) + ", call number " +
                    std::to_string(plan.calls));
  }
}

std::byte* FaultDevice::reserve(std::size_t bytes, std::size_t alignment) {
  enter(DeviceCall::reserve);
  return device_->reserve(bytes, alignment);
}

void FaultDevice::release(std::byte* address, std::size_t bytes) noexcept {
  device_->release(address, bytes);
}

std::vector<PageHandle> FaultDevice::create_pages(std::size_t page_bytes, std::size_t count) {
  enter(DeviceCall::create_pages);
  return device_->create_pages(page_bytes, count);
}

void FaultDevice::destroy_pages(std::size_t page_bytes, std::span<const PageHandle> pages) {
  enter(DeviceCall::destroy_pages);
  device_->destroy_pages(page_bytes, pages);
}

void FaultDevice::map(std::byte* address, std::size_t page_bytes,
                      std::span<const PageHandle> pages) {
  enter(DeviceCall::map);
  device_->map(address, page_bytes, pages);
}

void FaultDevice::map_repeated(std::byte* address, std::size_t bytes, std::size_t page_bytes,
                               PageHandle page) {
  enter(DeviceCall::map_repeated);
  device_->map_repeated(address, bytes, page_bytes, page);
}

void FaultDevice::unmap(std::byte* address, std::size_t bytes) {
  enter(DeviceCall::unmap);
  device_->unmap(address, bytes);
}

void FaultDevice::copy(std::byte* target, const std::byte* source, std::size_t bytes,
                       Stream stream) {
  enter(DeviceCall::copy);
  device_->copy(target, source, bytes, stream);
}

void FaultDevice::copy_many(std::span<const CopyJob> jobs, Stream stream) {
  for (std::size_t i = 0; i < jobs.size(); ++i) enter(DeviceCall::copy);
  device_->copy_many(jobs, stream);
}

void FaultDevice::fill(std::byte* target, int value, std::size_t bytes, Stream stream) {
  enter(DeviceCall::fill);
  device_->fill(target, value, bytes, stream);
}

std::shared_ptr<Event> FaultDevice::record(Stream stream) {
  try {
    enter(DeviceCall::record);
  } catch (const Error&) {
    // A device that cannot record has failed and runs nothing any more. Here it runs on, under
    // memory that the caller takes away then.
    device_->record(stream)->wait(Deadline::after_seconds(kDrainSeconds));
    throw;
  }
  return device_->record(stream);
}

ExportedPages FaultDevice::export_page(std::size_t page_bytes, PageHandle page) {
  enter(DeviceCall::export_page);
  return device_->export_page(page_bytes, page);
}

void FaultDevice::order_after(Stream stream, const std::shared_ptr<Event>& event) {
  enter(DeviceCall::order_after);
  device_->order_after(stream, event);
}

std::unique_ptr<ImportedPages> FaultDevice::import_run(std::span<const ExportedPages> exported,
                                                       PageAccess access) {
  enter(DeviceCall::import_pages);
  return device_->import_run(exported, access);
}

}  // namespace pipelive
