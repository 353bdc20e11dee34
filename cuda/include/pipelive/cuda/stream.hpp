#pragma once

#include <memory>
#include <string_view>

#include "pipelive/cuda/driver.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// CUDA's legacy default stream, which torch and cupy use unless told otherwise. (As in DLPack; a
/// null handle is the device's own queue.)
inline const Stream kDefaultStream{reinterpret_cast<void*>(kLegacyStream)};

/// Throws Error(busy), "<what>: the stream is being captured ...", where a stream is being captured
/// into a CUDA graph. What is then given to it becomes part of the graph and is not done now:
/// events recorded in it can never be asked, and events from outside make the capture fail if it
/// waits for them. The context must be current. Costs well below a microsecond.
void refuse_capture(const Driver& driver, StreamHandle stream, std::string_view what);

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
