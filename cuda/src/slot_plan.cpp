#include "pipelive/cuda/slot_plan.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/slot_copy.hpp"

namespace pipelive::cuda {
namespace {

// A row that is shorter costs the copy engine more than the kernel.
constexpr std::size_t kLeastRow = std::size_t{32} << 10;
constexpr std::uint64_t kMostVectors = std::uint64_t{1} << 31;

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

// The largest power of two up to 16 that divides every one of the numbers whose bits are or-ed in.
std::uint32_t common_vector(std::uint64_t bits) {
  return static_cast<std::uint32_t>(std::uint64_t{1} << std::countr_zero(bits | 16));
}

bool blocks_are_canonical(const BlockLayout& layout) {
  if (!layout.tokens_contiguous()) return false;
  const std::size_t fragment = layout.fragment_bytes * layout.block_size;
  for (std::size_t f = 0; f < layout.fragment_offsets.size(); ++f) {
    if (layout.fragment_offsets[f] != f * fragment) return false;
  }
  return layout.block_bytes == layout.slot_bytes() * layout.block_size;
}

class Planner {
 public:
  Planner(std::span<const LayerSlots> slots, std::size_t direct_bytes, bool strided,
          std::uint64_t alignment)
      : direct_bytes_(direct_bytes), strided_(strided) {
    if (slots.empty()) return;
    const BlockLayout& first = *slots.front().layout;
    std::uint64_t bits = alignment | first.fragment_bytes;
    for (const LayerSlots& layer : slots) {
      const BlockLayout& layout = *layer.layout;
      if (layout.block_size != first.block_size || layout.fragment_bytes != first.fragment_bytes ||
          layout.fragment_offsets.size() != first.fragment_offsets.size()) {
        refuse("slots of different shapes in one call: " + std::to_string(first.block_size) +
               " tokens of " + std::to_string(first.slot_bytes()) + " bytes and " +
               std::to_string(layout.block_size) + " of " + std::to_string(layout.slot_bytes()));
      }
      static_cast<void>(count_slots(layer.ranges, layer.memory.num_blocks * layout.block_size));
      bits |= address_of(layer) | layer.memory.block_stride | layout.token_stride;
      for (const std::size_t offset : layout.fragment_offsets) bits |= offset;
    }
    const std::uint32_t vector = common_vector(bits);
    const std::uint64_t slot_vectors = first.slot_bytes() / vector;
    if (first.slot_bytes() == 0 || slot_vectors * first.block_size >= kMostVectors / 2) {
      refuse("one block takes " + std::to_string(first.slot_bytes() * first.block_size) +
             " bytes in pieces of " + std::to_string(vector) + ", expected 1 to 2^30 - 1 pieces");
    }
    plan_.shape = shape_of(first.block_size, static_cast<u32>(first.fragment_bytes / vector),
                           static_cast<u32>(slot_vectors), vector);
    block_bytes_ = first.slot_bytes() * first.block_size;
    // Whole blocks, so that the canonical order does not see where a range is cut.
    most_slots_ = (kMostVectors - 1) / (slot_vectors * first.block_size) * first.block_size;
    for (const LayerSlots& layer : slots) add_layer(layer);
  }

  void add(const LayerSlots& layer, std::uint32_t index, SlotRange range) {
    const std::uint32_t block = plan_.shape.block_size;
    const std::uint64_t head = std::min(range.count, (block - range.begin % block) % block);
    const std::uint64_t blocks = (range.count - head) / block;
    const std::uint64_t stride = layer.memory.block_stride;
    const bool direct = blocks * block_bytes_ >= direct_bytes_ && blocks != 0 &&
                        blocks_are_canonical(*layer.layout) &&
                        (stride == block_bytes_ ||
                         (strided_ && block_bytes_ >= kLeastRow && stride < (1ULL << 31)));
    if (!direct) {
      add_records(index, range, 0, range.count);
      return;
    }
    if (head != 0) add_records(index, {range.begin, head}, 0, head);
    const std::uint64_t bytes = blocks * block_bytes_;
    const bool one_row = stride == block_bytes_;
    plan_.parts.push_back({plan_.bytes, plan_.bytes + bytes,
                           address_of(layer) + (range.begin + head) / block * stride,
                           one_row ? bytes : block_bytes_, one_row ? bytes : stride});
    plan_.bytes += bytes;
    const std::uint64_t done = head + blocks * block;
    if (done != range.count) {
      add_records(index, {range.begin + done, range.count - done}, 0, range.count - done);
    }
  }

  // Of the range, slots [keep_begin, keep_end) are copied.
  void add_records(std::uint32_t index, SlotRange range, std::uint64_t keep_begin,
                   std::uint64_t keep_end) {
    const std::uint32_t block = plan_.shape.block_size;
    for (std::uint64_t done = 0; done < range.count;) {
      const std::uint64_t begin = range.begin + done;
      const std::uint64_t count = std::min(range.count - done, most_slots_ - begin % block);
      const auto kept = [&](std::uint64_t slot) {
        return static_cast<u32>(std::clamp(slot, done, done + count) - done);
      };
      const std::uint64_t first_block = begin / block;
      if (first_block > std::numeric_limits<u32>::max()) {
        refuse("slot " + std::to_string(begin) + " lies in block " + std::to_string(first_block) +
               ", expected one below 2^32");
      }
      plan_.records.push_back({plan_.bytes / plan_.shape.vector_bytes,
                               static_cast<u32>(first_block), static_cast<u32>(begin % block),
                               static_cast<u32>(count), index, kept(keep_begin), kept(keep_end)});
      const std::uint64_t bytes = count * plan_.shape.slot_vectors * plan_.shape.vector_bytes;
      if (plan_.parts.empty() || plan_.parts.back().address != 0) {
        plan_.parts.push_back({plan_.bytes, plan_.bytes, 0, 0, 0});
      }
      plan_.parts.back().end += bytes;
      plan_.bytes += bytes;
      done += count;
    }
  }

  [[nodiscard]] SlotPlan take() { return std::move(plan_); }

 private:
  static std::uint64_t address_of(const LayerSlots& layer) {
    return reinterpret_cast<std::uintptr_t>(layer.memory.base);
  }

  void add_layer(const LayerSlots& layer) {
    SlotLayer entry{};
    entry.base = address_of(layer);
    entry.block_stride = layer.memory.block_stride;
    entry.token_stride = layer.layout->token_stride;
    const auto& own = layer.layout->fragment_offsets;
    // Layers of one pool share their offsets.
    if (!plan_.layers.empty() &&
        std::equal(own.begin(), own.end(),
                   plan_.offsets.begin() + plan_.layers.back().first_offset)) {
      entry.first_offset = plan_.layers.back().first_offset;
    } else {
      entry.first_offset = static_cast<u32>(plan_.offsets.size());
      plan_.offsets.insert(plan_.offsets.end(), own.begin(), own.end());
    }
    plan_.layers.push_back(entry);
  }

  SlotPlan plan_;
  std::size_t direct_bytes_;
  bool strided_;
  std::uint64_t block_bytes_ = 0;
  std::uint64_t most_slots_ = 0;
};

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

}  // namespace

std::size_t SlotPlan::table_bytes() const noexcept {
  return aligned(layers.size() * sizeof(SlotLayer)) + aligned(offsets.size() * sizeof(u64)) +
         aligned(records.size() * sizeof(SlotRecord));
}

SlotTable SlotPlan::write_tables(std::byte* host, std::uint64_t device) const {
  SlotTable table{};
  table.shape = shape;
  table.num_records = static_cast<u32>(records.size());
  std::size_t at = 0;
  const auto write = [&](const auto& entries) {
    const std::size_t size = entries.size() * sizeof(entries[0]);
    if (size != 0) std::memcpy(host + at, entries.data(), size);
    const u64 address = device + at;
    at += aligned(size);
    return address;
  };
  table.layers = write(layers);
  table.offsets = write(offsets);
  table.records = write(records);
  return table;
}

SlotPlan plan_slots(std::span<const LayerSlots> slots, std::size_t direct_bytes, bool strided,
                    std::uint64_t packed_alignment) {
  Planner planner(slots, direct_bytes, strided, packed_alignment);
  for (std::uint32_t index = 0; index < slots.size(); ++index) {
    for (const SlotRange& range : slots[index].ranges) {
      if (range.count != 0) planner.add(slots[index], index, range);
    }
  }
  return planner.take();
}

SlotPlan plan_slots_part(const LayerSlots& slots, SlotRange part, std::uint64_t packed_alignment) {
  const SlotRange range = slots.ranges.front();
  if (part.begin < range.begin || part.count > range.count ||
      part.begin - range.begin > range.count - part.count) {
    refuse("slots [" + std::to_string(part.begin) + ", +" + std::to_string(part.count) +
           ") are not a part of [" + std::to_string(range.begin) + ", +" +
           std::to_string(range.count) + ")");
  }
  Planner planner({&slots, 1}, 0, false, packed_alignment);
  const std::uint64_t first = part.begin - range.begin;
  planner.add_records(0, range, first, first + part.count);
  return planner.take();
}

std::vector<DirectCopy> direct_copies(const SlotPlan::Part& part, std::uint64_t begin,
                                      std::uint64_t end) {
  std::vector<DirectCopy> copies;
  while (begin < end) {
    const std::uint64_t row = (begin - part.begin) / part.row;
    const std::uint64_t inside = (begin - part.begin) % part.row;
    DirectCopy copy;
    copy.packed = begin;
    copy.address = part.address + row * part.pitch + inside;
    copy.row = std::min(part.row - inside, end - begin);
    copy.pitch = part.pitch;
    if (inside == 0 && copy.row == part.row) copy.rows = (end - begin) / part.row;
    // The last row on its own: what the driver checks of a strided copy is rows times pitch, and
    // the last pitch may end beyond what is mapped.
    if (copy.rows > 1 && begin + copy.rows * copy.row == end) copy.rows -= 1;
    begin += copy.row * copy.rows;
    copies.push_back(copy);
  }
  return copies;
}

}  // namespace pipelive::cuda
