#pragma once

#include <cstddef>

#include "pipelive/cuda/driver.hpp"

namespace pipelive::cuda {

/// Page-locked host memory, which copies to and from the device without a stop over. Made and freed
/// with a context current; must not outlive it, nor `driver`.
class PinnedBuffer {
 public:
  /// Throws Error(out_of_memory) where the host has too little.
  PinnedBuffer(const Driver& driver, std::size_t bytes) : driver_(driver), bytes_(bytes) {
    driver_.check(driver_.api().mem_host_alloc(&data_, bytes, kHostAllocPortable),
                  "cuMemHostAlloc");
  }
  ~PinnedBuffer() { driver_.api().mem_free_host(data_); }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return static_cast<std::byte*>(data_); }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  const Driver& driver_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

}  // namespace pipelive::cuda
