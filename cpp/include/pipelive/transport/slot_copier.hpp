#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/slot_range.hpp"
#include "pipelive/device/device.hpp"
#include "pipelive/kv/spec.hpp"

namespace pipelive {

/// Slots of one layer, in the order in which they travel. Borrows.
struct LayerSlots {
  const BlockLayout* layout = nullptr;
  LayerMemory memory;
  std::span<const SlotRange> ranges;
};

/// Packed slots: in host memory, or in memory of the device that a copier works on.
struct Packed {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  DeviceKind where = DeviceKind::host;
};
/// The same, only read.
struct ConstPacked {
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
  DeviceKind where = DeviceKind::host;
};

/// Moves slots of one device's layers into and out of their packed, canonical order (see
/// slot_copy.hpp), which is the same whatever the device and the memory order: so both ends of a
/// patch may be of different kinds.
///
/// The layers of one call come one after the other in the packed bytes. All ranges are checked
/// before the first byte is copied: Error(invalid_argument) where one lies outside its layer, where
/// the packed bytes are not exactly as many as the slots take, or where they lie in memory that the
/// copier does not reach. Which blocks are mapped the copier does not know: the caller holds them.
/// Error(device) where the device fails, Error(timeout) where it has not done its work by the
/// deadline; slots that were to be written may then hold either bytes.
///
/// Calls on a copier come from one thread at a time. What writes the slots must have completed
/// before (a step is sealed only then), unless the caller has ordered it by other means.
class SlotCopier {
 public:
  SlotCopier() = default;
  SlotCopier(const SlotCopier&) = delete;
  SlotCopier& operator=(const SlotCopier&) = delete;
  virtual ~SlotCopier() = default;

  /// Where the layers lie that it copies.
  [[nodiscard]] virtual DeviceKind kind() const noexcept = 0;

  /// Packs into `out`, which is filled when the call returns. With `checksum`, returns the CRC32C
  /// of what it packed, continued from `seed`; else `seed`.
  virtual std::uint32_t gather(std::span<const LayerSlots> slots, Packed out, bool checksum,
                               std::uint32_t seed, Deadline deadline) = 0;

  /// Writes packed slots to their places. Host memory `in` may be reused when the call returns,
  /// device memory after finish(); so may be read what was written.
  virtual void scatter(std::span<const LayerSlots> slots, ConstPacked in, Deadline deadline) = 0;

  /// As scatter for one packed range, but writes only the slots of `part`, which lies inside it.
  virtual void scatter_part(const BlockLayout& layout, const LayerMemory& memory, SlotRange range,
                            ConstPacked in, SlotRange part, Deadline deadline) = 0;

  /// CRC32C of what gather would pack, without a buffer of that size.
  [[nodiscard]] virtual std::uint32_t digest(const LayerSlots& slots, std::uint32_t seed,
                                             Deadline deadline) = 0;

  /// CRC32C of packed bytes, continued from `seed`.
  [[nodiscard]] virtual std::uint32_t crc(ConstPacked bytes, std::uint32_t seed, Deadline deadline);

  /// Copies plain bytes (weights); both lie where the copier reaches, and do not overlap. Done when
  /// the call returns.
  virtual void copy(Packed out, ConstPacked in, Deadline deadline);

  /// Waits until everything that was scattered is in its place.
  virtual void finish(Deadline deadline) = 0;

  /// The stream that all its work runs in; empty where a call leaves nothing under way. After
  /// Error(timeout) the work of that call is still in it: what it reads and writes must stay until
  /// idle().
  [[nodiscard]] virtual std::optional<Stream> work_stream() const noexcept { return std::nullopt; }
  /// Whether nothing is under way. From any thread.
  [[nodiscard]] virtual bool idle() const noexcept { return true; }
};

/// The copier for layers in host memory: the functions of slot_copy.hpp. Packed bytes lie in host
/// memory. The only copier that several threads may use at once.
[[nodiscard]] std::shared_ptr<SlotCopier> host_slot_copier();

}  // namespace pipelive
