#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace pipelive::cuda {

/// The compiled kernels of one .cu file, for several architectures, as cuModuleLoadData takes them.
struct Fatbin {
  std::string_view name;  ///< the file's name without its ending
  std::span<const std::byte> bytes;
};

/// All kernels that this build carries; empty where it was compiled without nvcc.
[[nodiscard]] std::span<const Fatbin> fatbins() noexcept;

/// What the kernels were compiled for: "sm_90" is machine code, "compute_100" is PTX.
[[nodiscard]] std::span<const std::string_view> fatbin_archs() noexcept;

/// The version of the nvcc that compiled them; empty where there was none.
[[nodiscard]] std::string_view fatbin_compiler() noexcept;

/// The text of a kernel file, or of a header that one includes, under the name it is included by.
struct KernelSource {
  std::string_view name;
  std::string_view text;
};

/// What NVRTC needs to compile the kernels; carried by every build.
[[nodiscard]] std::span<const KernelSource> kernel_sources() noexcept;

}  // namespace pipelive::cuda
