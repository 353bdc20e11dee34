#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipelive/cuda/driver.hpp"

namespace pipelive::cuda {

/// What one GPU can do; sizes in bytes.
struct DeviceReport {
  int index = 0;
  std::string name;
  std::string uuid;  ///< "GPU-..." as nvidia-smi writes it
  std::string pci_bus_id;
  int compute_major = 0;
  int compute_minor = 0;
  int multiprocessors = 0;
  int copy_engines = 0;
  std::uint64_t memory_total = 0;
  std::uint64_t memory_free = 0;
  std::uint64_t granularity = 0;              ///< of pages, at least
  std::uint64_t recommended_granularity = 0;  ///< what the driver advises
  bool exportable = false;                    ///< pages as file descriptors; tried with one page
  bool rdma = false;                          ///< GPUDirect RDMA; tried with one page
  std::vector<int> peers;                     ///< devices whose memory it can access directly
  std::string problem;                        ///< why it cannot be used; empty where it can
  std::string kernel_problem;  ///< why there are no kernels for it; empty where there are
};

struct SystemReport {
  std::optional<int> driver_version;  ///< as Driver::version()
  std::string problem;                ///< why no device can be used; empty where one can
  std::vector<std::string> missing;   ///< entry points that are useful and not there
  std::vector<DeviceReport> devices;
};

/// Looks at the driver and at every device, for people who ask why something does not work. Makes
/// each device's primary context for a moment. Never throws for what it finds.
[[nodiscard]] SystemReport report_system(const std::string& library = std::string(kDriverLibrary));

}  // namespace pipelive::cuda
