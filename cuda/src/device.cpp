#include "pipelive/cuda/device.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "device_text.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {

CudaDevice::CudaDevice(int ordinal, const std::string& library)
    : CudaDevice(Driver::open(library), ordinal) {}

CudaDevice::CudaDevice(std::shared_ptr<const Driver> driver, int ordinal,
                       Kernels::ImageSource images)
    : context_(std::make_shared<PrimaryContext>(std::move(driver), ordinal)), process_(::getpid()) {
  info_.kind = DeviceKind::cuda;
  info_.index = ordinal;
  info_.name = "cuda:" + std::to_string(ordinal);
  info_.zeroed_pages = false;
  const CallScope scope(*context_);
  if (attribute(DeviceAttribute::virtual_memory_supported) == 0) {
    throw Error(ErrorCode::device,
                info_.name + " (" + this->driver().device_name(ordinal) +
                    ") lacks virtual memory management (cuMemCreate, cuMemMap), which pools need");
  }
  this->driver().check(this->driver().api().device_total_mem(&total_bytes_, context_->device()),
                       "cuDeviceTotalMem");
  choose_properties();
  this->driver().check(this->driver().api().mem_get_allocation_granularity(
                           &info_.page_granularity, &properties_, Granularity::minimum),
                       "cuMemGetAllocationGranularity");
  events_ = std::make_shared<EventPool>(context_);
  own_ = std::make_unique<OwnStream>(context_);
  copier_ = std::make_unique<BatchCopier>(context_, events_, std::move(images));
}

CudaDevice::~CudaDevice() {
  if (::getpid() != process_) {
    // The parent's driver state is of no use here, and not to be touched.
    static_cast<void>(copier_.release());
    static_cast<void>(own_.release());
    static_cast<void>(new std::shared_ptr<EventPool>(events_));
    static_cast<void>(new std::shared_ptr<const PrimaryContext>(context_));
    return;
  }
  copier_.reset();
  std::vector<std::pair<std::byte*, std::size_t>> reservations;
  for (const auto& [address, reservation] : reservations_) {
    reservations.emplace_back(address, reservation.bytes);
  }
  for (const auto& [address, bytes] : reservations) release(address, bytes);
  try {
    const CallScope scope(*context_);
    for (const auto& [handle, page] : pages_) driver().api().mem_release(page.allocation);
  } catch (const Error&) {
    // The context is gone, and its memory with it.
  }
}

int CudaDevice::attribute(DeviceAttribute attribute) const {
  int value = 0;
  driver().check(driver().api().device_get_attribute(&value, attribute, context_->device()),
                 "cuDeviceGetAttribute");
  return value;
}

// Some containers and virtual GPUs report abilities that cuMemCreate then refuses, so what is
// wanted is tried with one page, and given up step by step.
void CudaDevice::choose_properties() {
  const DriverApi& api = driver().api();
  properties_.type = MemoryAllocationType::pinned;
  properties_.location = {MemoryLocationType::device, context_->device()};
  if (attribute(DeviceAttribute::posix_handle_supported) != 0) {
    properties_.handle_types = ShareableHandleType::posix_fd;
  }
  if (attribute(DeviceAttribute::rdma_with_vmm_supported) != 0) properties_.flags.rdma_capable = 1;
  for (;;) {
    std::size_t bytes = 0;
    AllocationHandle allocation = 0;
    Result result = api.mem_get_allocation_granularity(&bytes, &properties_, Granularity::minimum);
    if (result == kSuccess) result = api.mem_create(&allocation, bytes, &properties_, 0);
    if (result == kSuccess) {
      driver().check(api.mem_release(allocation), "cuMemRelease");
      return;
    }
    if (result == kOutOfMemory) return;  // says nothing about the properties
    if (properties_.flags.rdma_capable != 0) {
      properties_.flags.rdma_capable = 0;
    } else if (properties_.handle_types != ShareableHandleType::none) {
      properties_.handle_types = ShareableHandleType::none;
    } else {
      driver().fail(result, "cuMemCreate of one page");
    }
  }
}

CudaDevice::Memory CudaDevice::memory() const {
  const CallScope scope(*context_);
  Memory memory;
  driver().check(driver().api().mem_get_info(&memory.free, &memory.total), "cuMemGetInfo");
  return memory;
}

DeviceUsage CudaDevice::usage() const {
  const std::lock_guard lock(mutex_);
  return usage_;
}

StreamHandle CudaDevice::native(Stream stream) const noexcept {
  return stream.handle == nullptr ? own_->handle() : static_cast<StreamHandle>(stream.handle);
}

void CudaDevice::check_process(const char* call) const {
  if (::getpid() != process_) {
    throw Error(ErrorCode::device, std::string(call) + ": " + info_.name + " belongs to process " +
                                       std::to_string(process_) +
                                       ", this is a fork of it, where CUDA cannot be used");
  }
}

void CudaDevice::copy(std::byte* target, const std::byte* source, std::size_t bytes,
                      Stream stream) {
  if (bytes == 0) return;
  check_process("copy");
  const CallScope scope(*context_);
  driver().check(
      driver().api().memcpy_async(pointer(target), pointer(source), bytes, native(stream)),
      "cuMemcpyAsync(" + bytes_text(bytes) + ")");
}

void CudaDevice::prepare_copies() {
  check_process("prepare_copies");
  const CallScope scope(*context_);
  copier_->prepare();
}

void CudaDevice::copy_many(std::span<const CopyJob> jobs, Stream stream) {
  if (jobs.empty()) return;
  check_process("copy_many");
  const CallScope scope(*context_);
  if (stream.handle != nullptr) {
    refuse_capture(driver(), native(stream), "moving blocks in memory of " + info_.name);
  }
  copier_->copy(jobs, native(stream));
}

void CudaDevice::fill(std::byte* target, int value, std::size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check_process("fill");
  const CallScope scope(*context_);
  driver().check(driver().api().memset_d8_async(pointer(target), static_cast<unsigned char>(value),
                                                bytes, native(stream)),
                 "cuMemsetD8Async(" + bytes_text(bytes) + ")");
}

std::shared_ptr<Event> CudaDevice::record(Stream stream) {
  check_process("record");
  const CallScope scope(*context_);
  if (stream.handle != nullptr) {  // nobody captures our own
    refuse_capture(driver(), native(stream), "waiting for work on memory of " + info_.name);
  }
  return events_->record(native(stream));
}

void CudaDevice::order_after(Stream stream, const std::shared_ptr<Event>& event) {
  if (event == nullptr) return;
  check_process("order_after");
  const auto* own = dynamic_cast<const CudaEvent*>(event.get());
  if (own == nullptr) {
    constexpr double kForeignEventSeconds = 60.0;
    event->wait(Deadline::after_seconds(kForeignEventSeconds));
    return;
  }
  const CallScope scope(*context_);
  if (stream.handle != nullptr) {
    refuse_capture(driver(), native(stream),
                   "ordering a stream behind other users of memory of " + info_.name);
  }
  driver().check(driver().api().stream_wait_event(native(stream), own->handle(), 0),
                 "cuStreamWaitEvent");
}

ExportedPages CudaDevice::export_page(std::size_t page_bytes, PageHandle page) {
  check_page_bytes(page_bytes);
  check_process("export_page");
  AllocationHandle allocation = 0;
  {
    const std::lock_guard lock(mutex_);
    allocation = find_page("export_page", page_bytes, page).allocation;
  }
  if (!exportable()) {
    throw Error(ErrorCode::device, info_.name + " cannot export memory as file descriptors");
  }
  const CallScope scope(*context_);
  int fd = -1;
  driver().check(driver().api().mem_export_to_shareable_handle(&fd, allocation,
                                                               ShareableHandleType::posix_fd, 0),
                 "cuMemExportToShareableHandle");
  UniqueFd owned(fd);
  // A child that is started meanwhile must not inherit it.
  static_cast<void>(::fcntl(owned.get(), F_SETFD, FD_CLOEXEC));
  return {std::move(owned), 0, page_bytes};
}

}  // namespace pipelive::cuda
