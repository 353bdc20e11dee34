#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "pipelive/cuda/driver.hpp"
#include "pipelive/cuda/slot_kernels.hpp"
#include "pipelive/transport/slot_copier.hpp"

namespace pipelive::cuda {

/// Moves slots of layers in GPU memory into and out of packed bytes, in host memory or on the same
/// device. Everything runs on a stream of its own; nothing ever waits for the whole device.
///
/// Short runs go by a kernel into a staging buffer, long contiguous ones (whole blocks of a layer
/// whose blocks are packed already) by the copy engine, so that decoding keeps its SMs. To and from
/// host memory the bytes pass pinned buffers in pieces, so that packing, the bus and the host's own
/// copy (with its checksum) overlap.
///
/// The stream does not wait for anybody else's: what has written the slots must have completed, or
/// be ordered before by wait_for().
class CudaSlotCopier final : public SlotCopier {
 public:
  struct Options {
    std::size_t lane_bytes = std::size_t{2} << 20;  ///< one staging buffer; a multiple of 64 KiB
    unsigned lanes = 3;                             ///< staging buffers, pinned and on the device
    std::size_t direct_bytes = std::size_t{256} << 10;  ///< runs from here on: by the copy engine
  };

  /// Loads the kernels and makes stream and buffers, so that later calls allocate nothing unless a
  /// call has more than about 16,000 ranges. Throws Error(invalid_argument) for options out of
  /// range, Error(out_of_memory) or Error(device).
  explicit CudaSlotCopier(std::shared_ptr<const PrimaryContext> context);
  CudaSlotCopier(std::shared_ptr<const PrimaryContext> context, const Options& options);
  CudaSlotCopier(std::shared_ptr<const SlotKernels> kernels, const Options& options);
  /// Waits for what is under way.
  ~CudaSlotCopier() override;

  /// A copier with the default options that goes back to a small store when it is let go of: to
  /// free its buffers would make the driver wait for the whole device. One whose work is not done
  /// then is lent again only once it is. Throws as the constructor does.
  [[nodiscard]] static std::shared_ptr<CudaSlotCopier> lend(
      const std::shared_ptr<const PrimaryContext>& context);
  /// Empties the store; for tests, which take the driver down.
  static void forget();

  // As SlotCopier says; `Packed` may lie in host memory (pageable or pinned) or on this device.
  [[nodiscard]] DeviceKind kind() const noexcept override { return DeviceKind::cuda; }
  std::uint32_t gather(std::span<const LayerSlots> slots, Packed out, bool checksum,
                       std::uint32_t seed, Deadline deadline) override;
  void scatter(std::span<const LayerSlots> slots, ConstPacked in, Deadline deadline) override;
  void scatter_part(const BlockLayout& layout, const LayerMemory& memory, SlotRange range,
                    ConstPacked in, SlotRange part, Deadline deadline) override;
  [[nodiscard]] std::uint32_t digest(const LayerSlots& slots, std::uint32_t seed,
                                     Deadline deadline) override;
  [[nodiscard]] std::uint32_t crc(ConstPacked bytes, std::uint32_t seed,
                                  Deadline deadline) override;
  void copy(Packed out, ConstPacked in, Deadline deadline) override;
  void finish(Deadline deadline) override;
  [[nodiscard]] std::optional<Stream> work_stream() const noexcept override;
  [[nodiscard]] bool idle() const noexcept override;

  // -- for transports that carry packed bytes in device memory (P2P, NCCL): enqueue and return ----

  /// Packs into `out` in the order of stream(); `bytes` is exactly what the slots take. The
  /// deadline is for earlier calls, whose tables may still be in use.
  void gather_async(std::span<const LayerSlots> slots, DevicePointer out, std::size_t bytes,
                    Deadline deadline);
  /// Writes the packed bytes at `in` to their places in the order of stream().
  void scatter_async(std::span<const LayerSlots> slots, DevicePointer in, std::size_t bytes,
                     Deadline deadline);
  /// CRC32C of device memory, after everything enqueued so far; the same value as crc32c() of the
  /// same bytes on the host. Waits for it.
  [[nodiscard]] std::uint32_t crc(DevicePointer bytes, std::size_t size, std::uint32_t seed,
                                  Deadline deadline);

  /// The stream of all of the copier's work; wait for it by events of your own, or by finish().
  [[nodiscard]] StreamHandle stream() const noexcept;
  /// Lets what is enqueued from now on wait for `event`, without the host waiting.
  void wait_for(EventHandle event);
  [[nodiscard]] const PrimaryContext& context() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace pipelive::cuda
