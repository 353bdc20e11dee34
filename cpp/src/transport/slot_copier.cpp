#include "pipelive/transport/slot_copier.hpp"

#include <cstring>
#include <string>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/slot_copy.hpp"

namespace pipelive {
namespace {

// Splits packed bytes among layers; throws before the first byte is copied.
void check(std::span<const LayerSlots> slots, std::size_t bytes, DeviceKind where) {
  if (where != DeviceKind::host) {
    throw Error(ErrorCode::invalid_argument,
                "packed slots lie in device memory, which the host does not reach");
  }
  std::size_t needed = 0;
  for (const LayerSlots& layer : slots) {
    needed += count_slots(layer.ranges, layer.memory.num_blocks * layer.layout->block_size) *
              layer.layout->slot_bytes();
  }
  if (needed != bytes) {
    throw Error(ErrorCode::invalid_argument, "the packed buffer has " + std::to_string(bytes) +
                                                 " bytes, expected " + std::to_string(needed) +
                                                 " for the slots of " +
                                                 std::to_string(slots.size()) + " layers");
  }
}

std::size_t bytes_of(const LayerSlots& layer) {
  std::uint64_t slots = 0;
  for (const SlotRange& range : layer.ranges) slots += range.count;
  return slots * layer.layout->slot_bytes();
}

class HostSlotCopier final : public SlotCopier {
 public:
  [[nodiscard]] DeviceKind kind() const noexcept override { return DeviceKind::host; }

  std::uint32_t gather(std::span<const LayerSlots> slots, Packed out, bool checksum,
                       std::uint32_t seed, Deadline /*deadline*/) override {
    check(slots, out.bytes, out.where);
    std::byte* at = out.data;
    for (const LayerSlots& layer : slots) {
      const std::span<std::byte> piece(at, bytes_of(layer));
      if (checksum) {
        seed = gather_crc(*layer.layout, layer.memory, layer.ranges, piece, seed);
      } else {
        pipelive::gather(*layer.layout, layer.memory, layer.ranges, piece);
      }
      at += piece.size();
    }
    return seed;
  }

  void scatter(std::span<const LayerSlots> slots, ConstPacked in, Deadline /*deadline*/) override {
    check(slots, in.bytes, in.where);
    const std::byte* at = in.data;
    for (const LayerSlots& layer : slots) {
      const std::span<const std::byte> piece(at, bytes_of(layer));
      pipelive::scatter(*layer.layout, layer.memory, layer.ranges, piece);
      at += piece.size();
    }
  }

  void scatter_part(const BlockLayout& layout, const LayerMemory& memory, SlotRange range,
                    ConstPacked in, SlotRange part, Deadline /*deadline*/) override {
    if (in.where != DeviceKind::host) check({}, 0, in.where);
    pipelive::scatter_part(layout, memory, range, {in.data, in.bytes}, part);
  }

  std::uint32_t digest(const LayerSlots& slots, std::uint32_t seed,
                       Deadline /*deadline*/) override {
    return pipelive::digest(*slots.layout, slots.memory, slots.ranges, seed);
  }

  void finish(Deadline /*deadline*/) override {}
};

}  // namespace

std::uint32_t SlotCopier::crc(ConstPacked bytes, std::uint32_t seed, Deadline /*deadline*/) {
  check({}, 0, bytes.where);
  return crc32c({bytes.data, bytes.bytes}, seed);
}

void SlotCopier::copy(Packed out, ConstPacked in, Deadline /*deadline*/) {
  check({}, 0, out.where);
  check({}, 0, in.where);
  if (out.bytes != in.bytes) {
    throw Error(ErrorCode::invalid_argument, "copy of " + std::to_string(in.bytes) +
                                                 " bytes to a place of " +
                                                 std::to_string(out.bytes));
  }
  if (in.bytes != 0) std::memcpy(out.data, in.data, in.bytes);
}

std::shared_ptr<SlotCopier> host_slot_copier() {
  static const std::shared_ptr<SlotCopier> copier = std::make_shared<HostSlotCopier>();
  return copier;
}

}  // namespace pipelive
