#include "pipelive/cuda/report.hpp"

#include <array>
#include <cstdio>
#include <memory>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/nvrtc.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

std::string uuid_text(const Uuid& uuid) {
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof uuid.bytes; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    std::array<char, 3> digits{};
    std::snprintf(digits.data(), digits.size(), "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    text += digits.data();
  }
  return text;
}

void describe(const Driver& driver, DeviceReport& report) {
  const DriverApi& api = driver.api();
  DeviceOrdinal device = 0;
  driver.check(api.device_get(&device, report.index), "cuDeviceGet");
  report.name = driver.device_name(report.index);
  const auto number = [&](DeviceAttribute attribute) {
    int value = 0;
    driver.check(api.device_get_attribute(&value, attribute, device), "cuDeviceGetAttribute");
    return value;
  };
  report.compute_major = number(DeviceAttribute::compute_capability_major);
  report.compute_minor = number(DeviceAttribute::compute_capability_minor);
  report.multiprocessors = number(DeviceAttribute::multiprocessor_count);
  report.copy_engines = number(DeviceAttribute::async_engine_count);
  DeviceLimits limits;
  limits.major = report.compute_major;
  limits.minor = report.compute_minor;
  limits.driver_version = driver.version();
  report.kernel_problem = kernel_problem(limits);
  Uuid uuid{};
  if (api.device_get_uuid(&uuid, device) == kSuccess) report.uuid = uuid_text(uuid);
  std::array<char, 32> bus{};
  if (api.device_get_pci_bus_id(bus.data(), static_cast<int>(bus.size()) - 1, device) == kSuccess) {
    report.pci_bus_id = bus.data();
  }
  std::size_t total = 0;
  driver.check(api.device_total_mem(&total, device), "cuDeviceTotalMem");
  report.memory_total = total;
  const int count = driver.device_count();
  for (int other = 0; other < count; ++other) {
    DeviceOrdinal peer = 0;
    int can = 0;
    if (other != report.index && api.device_get(&peer, other) == kSuccess &&
        api.device_can_access_peer(&can, device, peer) == kSuccess && can != 0) {
      report.peers.push_back(other);
    }
  }
}

void try_memory(const std::shared_ptr<const Driver>& driver, DeviceReport& report) {
  CudaDevice device(driver, report.index);
  report.memory_free = device.memory().free;
  report.granularity = device.info().page_granularity;
  report.exportable = device.exportable();
  report.rdma = device.rdma();
  const CallScope scope(*device.context());
  AllocationProperties properties;
  properties.type = MemoryAllocationType::pinned;
  properties.location = {MemoryLocationType::device, device.context()->device()};
  std::size_t recommended = 0;
  driver->check(driver->api().mem_get_allocation_granularity(&recommended, &properties,
                                                             Granularity::recommended),
                "cuMemGetAllocationGranularity");
  report.recommended_granularity = recommended;
}

}  // namespace

SystemReport report_system(const std::string& library) {
  SystemReport report;
  std::shared_ptr<const Driver> driver;
  int count = 0;
  try {
    driver = Driver::open(library);
    report.driver_version = driver->version();
    count = driver->device_count();
    if (count == 0) report.problem = "the CUDA driver sees no device";
  } catch (const Error& error) {
    report.problem = error.what();
    return report;
  }
#define PIPELIVE_CUDA_MISSING(member, symbol, parameters) \
  if (driver->api().member == nullptr) report.missing.emplace_back(#symbol);
  PIPELIVE_CUDA_OPTIONAL_DRIVER_FUNCTIONS(PIPELIVE_CUDA_MISSING)
#undef PIPELIVE_CUDA_MISSING
  for (int index = 0; index < count; ++index) {
    DeviceReport& device = report.devices.emplace_back();
    device.index = index;
    try {
      describe(*driver, device);
      try_memory(driver, device);
    } catch (const Error& error) {
      device.problem = error.what();
    }
  }
  return report;
}

}  // namespace pipelive::cuda
