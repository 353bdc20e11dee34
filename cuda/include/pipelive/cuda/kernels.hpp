#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "pipelive/cuda/driver.hpp"

namespace pipelive::cuda {

/// What a launcher must know of a device.
struct DeviceLimits {
  int major = 0;  ///< compute capability
  int minor = 0;
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;           ///< at most, if a kernel asks for it
  int shared_bytes_per_multiprocessor = 0;  ///< of all its blocks together
  int driver_version = 0;                   ///< as Driver::version()
};

/// Kernels of one .cu file, as NVRTC is to compile them where the build carries none for a device:
/// with these macros ("NAME=VALUE") only those that are needed.
struct KernelFile {
  std::string name;  ///< without the ending
  std::vector<std::string> macros;
};

/// The kernels of one device, loaded at first use and kept. Thread-safe.
class Kernels {
 public:
  /// Gives machine code for a file; the default, kernel_image, takes what the build carries or
  /// compiles it.
  using ImageSource =
      std::function<std::vector<std::byte>(const KernelFile& file, const DeviceLimits& limits)>;

  /// Throws Error(device) where the driver refuses.
  explicit Kernels(std::shared_ptr<const PrimaryContext> context, ImageSource source = {});
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;
  ~Kernels();

  /// Those of a context, made at first use and never taken down: captured graphs go on launching
  /// them, and the driver may be gone when a process ends.
  [[nodiscard]] static std::shared_ptr<Kernels> of(
      const std::shared_ptr<const PrimaryContext>& context);
  /// Lets go of all of them; for tests, which take the driver down.
  static void forget();

  [[nodiscard]] const DeviceLimits& limits() const noexcept { return limits_; }
  [[nodiscard]] const std::shared_ptr<const PrimaryContext>& context() const noexcept {
    return context_;
  }
  [[nodiscard]] const Driver& driver() const noexcept { return context_->driver(); }

  /// A kernel that may be launched with so much dynamic shared memory. The device's context must be
  /// current. The first call for a file loads it, which may take seconds where it is compiled, and
  /// must not happen while a stream is being captured. Throws Error(device) that names the kernel.
  [[nodiscard]] FunctionHandle function(const KernelFile& file, const std::string& kernel,
                                        unsigned shared_bytes);

 private:
  struct Function {
    FunctionHandle handle = nullptr;
    unsigned shared_bytes = 0;  ///< that it may be launched with
  };

  const std::shared_ptr<const PrimaryContext> context_;
  const ImageSource source_;
  DeviceLimits limits_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Module>> modules_;
  std::map<std::string, Function, std::less<>> functions_;
};

}  // namespace pipelive::cuda
