#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "pipelive/cuda/driver_api.hpp"

namespace pipelive::cuda {

inline constexpr std::string_view kDriverLibrary = "libcuda.so.1";

/// libcuda, opened at run time and initialised. Immutable, so it may be used by several threads.
class Driver {
 public:
  /// Opens the library, finds every entry point and calls cuInit. Throws Error(device) that names
  /// the library, the symbol or the call that failed, and why.
  [[nodiscard]] static std::shared_ptr<const Driver> open(
      const std::string& library = std::string(kDriverLibrary));

  [[nodiscard]] const DriverApi& api() const noexcept { return api_; }

  /// The newest CUDA version that the driver supports: 1000 * major + 10 * minor.
  [[nodiscard]] int version() const noexcept { return version_; }

  [[nodiscard]] int device_count() const;
  [[nodiscard]] std::string device_name(int ordinal) const;

  /// Throws for any result but success: Error(out_of_memory) if the device has no memory left, else
  /// Error(device): "cuLaunchKernel: CUDA_ERROR_INVALID_VALUE (1): invalid argument".
  void check(Result result, std::string_view call) const {
    if (result != kSuccess) fail(result, call);
  }
  [[noreturn]] void fail(Result result, std::string_view call) const;

 private:
  struct Closer {
    void operator()(void* library) const noexcept;
  };

  Driver() = default;

  std::unique_ptr<void, Closer> library_;
  DriverApi api_;
  int version_ = 0;
};

/// What `Driver::open` would find, for reports; never throws for a driver that is missing or
/// broken.
struct DriverProbe {
  std::optional<int> version;  ///< as Driver::version(); none where the driver cannot be used
  int device_count = 0;
  std::string problem;  ///< why no device can be used; empty where one can
};
[[nodiscard]] DriverProbe probe_driver(const std::string& library = std::string(kDriverLibrary));

/// A device's primary context, shared with whatever else in the process uses the CUDA runtime.
class PrimaryContext {
 public:
  /// Throws Error(invalid_argument) if there is no device of that number, Error(device) if the
  /// driver refuses.
  PrimaryContext(std::shared_ptr<const Driver> driver, int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  [[nodiscard]] const Driver& driver() const noexcept { return *driver_; }
  [[nodiscard]] ContextHandle handle() const noexcept { return context_; }
  [[nodiscard]] DeviceOrdinal device() const noexcept { return device_; }

 private:
  std::shared_ptr<const Driver> driver_;
  DeviceOrdinal device_ = 0;
  ContextHandle context_ = nullptr;
};

/// Makes a context current in this thread while it lives, and what was current before afterwards.
class ContextScope {
 public:
  explicit ContextScope(const PrimaryContext& context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

/// Kernels loaded into the context that is current. Must not outlive it, nor `driver`.
class Module {
 public:
  /// `image` is a fatbin. Throws Error(device), for instance if it holds nothing for this device.
  Module(const Driver& driver, std::span<const std::byte> image);
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  /// Throws Error(device) that names the kernel if the module has none of that name.
  [[nodiscard]] FunctionHandle function(const std::string& name) const;

 private:
  const Driver& driver_;
  ModuleHandle module_ = nullptr;
};

/// Plain device memory of the context that is current. Must not outlive it, nor `driver`.
class DeviceBuffer {
 public:
  /// Throws Error(invalid_argument) for 0 bytes, Error(out_of_memory) if the device has too little.
  DeviceBuffer(const Driver& driver, std::size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  [[nodiscard]] DevicePointer pointer() const noexcept { return pointer_; }

 private:
  const Driver& driver_;
  DevicePointer pointer_ = 0;
};

}  // namespace pipelive::cuda
