#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pipelive/cuda/kernels.hpp"

namespace pipelive::cuda {

/// NVIDIA's run-time compiler, opened at run time: part of the CUDA toolkit, of torch, and of the
/// packages nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvrtc. It compiles without a GPU.
class Nvrtc {
 public:
  /// Opens the first of `libraries` (names or paths, as for dlopen) that there is and whose version
  /// is at most `newest_major`: a driver does not take what a newer major version compiled. Throws
  /// Error(device) that says what was wrong with each and which package would help.
  [[nodiscard]] static std::shared_ptr<const Nvrtc> open(const std::vector<std::string>& libraries,
                                                         int newest_major);
  /// The names to try where the caller knows no paths.
  [[nodiscard]] static std::vector<std::string> default_libraries();

  [[nodiscard]] const std::string& library() const noexcept { return name_; }
  [[nodiscard]] int major() const noexcept { return major_; }
  [[nodiscard]] int minor() const noexcept { return minor_; }

  /// Compiles one of kernel_sources() for a compute capability (10 * major + minor): to machine
  /// code if the compiler knows it, else to PTX for the newest that it knows, which a driver
  /// translates. Throws Error(device) with the compiler's messages.
  [[nodiscard]] std::vector<std::byte> compile(const KernelFile& file, int capability) const;
  /// Compiles a kernel that does nothing, to see whether all that NVRTC needs is there. Throws as
  /// compile() does.
  void try_out(int capability) const;
  /// What it would compile to for a compute capability: "sm_90" or "compute_90". Throws
  /// Error(device) where it knows nothing so old.
  [[nodiscard]] std::string target_for(int capability) const;

 private:
  struct Api;
  struct Closer {
    void operator()(void* library) const noexcept;
  };
  using Headers = std::vector<std::pair<std::string, std::string>>;  // names and texts
  Nvrtc() = default;
  void check(int result, const char* call) const;
  [[nodiscard]] std::vector<std::byte> compile_text(const std::string& main,
                                                    const std::string& source,
                                                    const Headers& headers,
                                                    const std::vector<std::string>& macros,
                                                    int capability) const;

  std::unique_ptr<void, Closer> handle_;
  std::shared_ptr<const Api> api_;
  std::string name_;
  int major_ = 0;
  int minor_ = 0;
};

/// Compiled kernels on disk, one file each, named by a hash of all that they depend on. Several
/// processes may use one folder. Failing to write is no error; a damaged file is ignored.
class KernelCache {
 public:
  /// An empty path: nothing is kept.
  explicit KernelCache(std::string folder) : folder_(std::move(folder)) {}
  /// $XDG_CACHE_HOME/pipelive_kv/kernels or ~/.cache/pipelive_kv/kernels; empty where neither is
  /// known.
  [[nodiscard]] static std::string default_folder();

  /// Empty where there is none.
  [[nodiscard]] std::vector<std::byte> find(const std::string& key) const;
  void keep(const std::string& key, const std::vector<std::byte>& image) const noexcept;

 private:
  std::string folder_;
};

/// The name of what `compile` would give: a hash of the sources, the macros, the compiler's version
/// and the capability.
[[nodiscard]] std::string cache_key(const KernelFile& file, int capability, int compiler_major,
                                    int compiler_minor);

/// Where kernel_image looks for NVRTC, before default_libraries(); of the process. Thread-safe.
void set_nvrtc_libraries(std::vector<std::string> libraries);

/// Why the fatbins of this build do not suit a device: there are none, their compiler is newer than
/// the driver, or they hold nothing for the device. Empty where they do.
[[nodiscard]] std::string why_not_carried(const DeviceLimits& limits);

/// Machine code of a file for a device, for every kernel of ours: the fatbin of this build where
/// why_not_carried() has nothing to say, else compiled now, or before and kept. Throws
/// Error(device) that says why neither is possible.
[[nodiscard]] std::vector<std::byte> kernel_image(const KernelFile& file,
                                                  const DeviceLimits& limits);

/// Why kernel_image would have nothing for a device, short of sources that do not compile; empty
/// where it has. Of NVRTC it asks for a kernel that does nothing.
[[nodiscard]] std::string kernel_problem(const DeviceLimits& limits);

/// Whether code for one of `archs` ("sm_90", "compute_100") runs on a compute capability.
[[nodiscard]] bool runs_on(std::span<const std::string_view> archs, int capability) noexcept;

}  // namespace pipelive::cuda
