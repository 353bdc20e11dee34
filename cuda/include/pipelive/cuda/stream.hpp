#pragma once

#include <memory>

#include "pipelive/cuda/driver.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// CUDA's legacy default stream, which torch and cupy use unless told otherwise. (As in DLPack; a
/// null handle is the device's own queue.)
inline const Stream kDefaultStream{reinterpret_cast<void*>(kLegacyStream)};

/// A stream of our own, which does not wait for the legacy default stream nor the other way round.
class OwnStream {
 public:
  enum class Priority { normal, high };

  /// Throws Error(device).
  explicit OwnStream(std::shared_ptr<const PrimaryContext> context,
                     Priority priority = Priority::normal);
  ~OwnStream();
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  [[nodiscard]] StreamHandle handle() const noexcept { return handle_; }
  [[nodiscard]] Stream stream() const noexcept { return {handle_}; }

 private:
  const std::shared_ptr<const PrimaryContext> context_;
  StreamHandle handle_ = nullptr;
};

}  // namespace pipelive::cuda
