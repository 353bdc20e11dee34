#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "pipelive/cuda/driver_types.hpp"

// What the parts of CudaDevice share: addresses as the driver takes them, sizes in messages.
namespace pipelive::cuda {

inline std::string bytes_text(std::uint64_t bytes) {
  return std::to_string(bytes) + " bytes";
}

inline DevicePointer pointer(const std::byte* address) noexcept {
  return reinterpret_cast<std::uintptr_t>(address);
}

}  // namespace pipelive::cuda
