#pragma once

#include <cstdint>
#include <memory>

#include "pipelive/cuda/crc_math.hpp"
#include "pipelive/cuda/pinned_buffer.hpp"
#include "pipelive/cuda/slot_kernels.hpp"

namespace pipelive::cuda {

/// CRC32C of device memory, piece by piece: the device sums tiles, the host joins them. Made, used
/// and ended with the kernels' context current; one piece at a time.
class DeviceCrc {
 public:
  explicit DeviceCrc(std::shared_ptr<const SlotKernels> kernels);

  /// Gives the sums of as many of the `size` bytes (at least 1) as one piece holds to the stream.
  /// `size` of the result says how many.
  [[nodiscard]] CrcArgs start(DevicePointer bytes, std::size_t size, StreamHandle stream);
  /// Continues `seed` by a started piece, once the stream has come so far.
  [[nodiscard]] std::uint32_t join(const CrcArgs& piece, std::uint32_t seed) const;

 private:
  const std::shared_ptr<const SlotKernels> kernels_;
  PinnedBuffer sums_;
  DeviceBuffer device_sums_;
};

}  // namespace pipelive::cuda
