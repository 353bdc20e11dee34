#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>

#include "pipelive/cuda/driver.hpp"
#include "pipelive/cuda/kernels.hpp"

namespace pipelive::cuda {

/// The kernels that work on slots, loaded into one device's context: append, marks, gather, scatter
/// and checksum. Immutable, so that several threads may use it.
class SlotKernels {
 public:
  /// Those of a context, loaded from Kernels::of at the first call for it and kept: a launch may be
  /// under way, or captured in a graph, long after its caller has gone. The first call may take
  /// seconds, where NVRTC compiles. Throws Error(device) that says why there is no code for the
  /// device.
  [[nodiscard]] static std::shared_ptr<const SlotKernels> of(
      const std::shared_ptr<const PrimaryContext>& context);
  /// Lets go of what of() has kept; for tests, which take the driver down.
  static void forget();

  /// Throws Error(device).
  explicit SlotKernels(std::shared_ptr<Kernels> kernels);
  ~SlotKernels();
  SlotKernels(const SlotKernels&) = delete;
  SlotKernels& operator=(const SlotKernels&) = delete;

  [[nodiscard]] const std::shared_ptr<const PrimaryContext>& context() const noexcept {
    return kernels_->context();
  }

  /// By what one thread moves: 16, 4 or 2 bytes.
  [[nodiscard]] FunctionHandle append(unsigned bytes) const;
  /// From float32 to bfloat16 or float16, four numbers at a time or one.
  [[nodiscard]] FunctionHandle append_narrow(bool bfloat16, bool four) const noexcept;
  /// By the bytes of a vector: 16, 8, 4, 2 or 1.
  [[nodiscard]] FunctionHandle gather(unsigned bytes) const;
  [[nodiscard]] FunctionHandle scatter(unsigned bytes) const;

  FunctionHandle crc_tiles = nullptr;
  FunctionHandle marks_take = nullptr;
  FunctionHandle marks_fold = nullptr;
  FunctionHandle marks_emit = nullptr;
  /// CrcTables in device memory.
  [[nodiscard]] DevicePointer crc_tables() const noexcept;

  /// Launches a kernel whose one parameter is `args`, with `threads` threads in each of `blocks`
  /// blocks (at least 1). The context must be current.
  template <typename Args>
  void launch(FunctionHandle kernel, std::string_view name, std::uint64_t blocks, unsigned threads,
              StreamHandle stream, const Args& args) const {
    launch_raw(kernel, name, blocks, threads, stream, &args);
  }

 private:
  void launch_raw(FunctionHandle kernel, std::string_view name, std::uint64_t blocks,
                  unsigned threads, StreamHandle stream, const void* args) const;

  const std::shared_ptr<Kernels> kernels_;
  std::unique_ptr<DeviceBuffer> tables_;
  std::array<FunctionHandle, 5> append_raw_{};  // by the logarithm of the bytes
  std::array<FunctionHandle, 5> gather_{};
  std::array<FunctionHandle, 5> scatter_{};
  std::array<std::array<FunctionHandle, 2>, 2> narrow_{};  // by bfloat16, four
};

}  // namespace pipelive::cuda
