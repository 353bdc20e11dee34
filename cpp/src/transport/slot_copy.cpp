#include "pipelive/transport/slot_copy.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kLine = 64;
// Lines asked for ahead of the copy: about what a core can have in flight.
constexpr std::size_t kAhead = 32;
// Longer runs are left to the processor's own prefetcher.
constexpr std::size_t kPrefetchBytes = 512;

// A run of tokens inside one block.
struct Piece {
  std::byte* block = nullptr;
  std::uint32_t token = 0;
  std::uint32_t count = 0;
};

// Walks ranges block by block.
class Cursor {
 public:
  Cursor(const BlockLayout& layout, const LayerMemory& memory, std::span<const SlotRange> ranges)
      : block_size_(layout.block_size), memory_(memory), ranges_(ranges) {}

  bool next(Piece& piece) noexcept {
    while (done_ == count_) {
      if (index_ == ranges_.size()) return false;
      const SlotRange& range = ranges_[index_++];
      done_ = 0;
      count_ = range.count;
      block_ = range.begin / block_size_;
      token_ = static_cast<std::uint32_t>(range.begin % block_size_);
    }
    piece.block = memory_.base + block_ * memory_.block_stride;
    piece.token = token_;
    piece.count =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(block_size_ - token_, count_ - done_));
    done_ += piece.count;
    ++block_;
    token_ = 0;
    return true;
  }

 private:
  std::uint32_t block_size_;
  const LayerMemory& memory_;
  std::span<const SlotRange> ranges_;
  std::size_t index_ = 0;
  std::uint64_t block_ = 0;
  std::uint32_t token_ = 0;
  std::uint64_t done_ = 0;
  std::uint64_t count_ = 0;
};

bool block_is_canonical(const BlockLayout& layout) {
  if (!layout.tokens_contiguous()) return false;
  const std::size_t fragment = layout.fragment_bytes * layout.block_size;
  for (std::size_t f = 0; f < layout.fragment_offsets.size(); ++f) {
    if (layout.fragment_offsets[f] != f * fragment) return false;
  }
  return true;
}

// kBytes is the length of a token's fragment where it is known at compile time, else 0.
template <bool kGather, std::size_t kBytes>
struct Mover {
  using Packed = std::conditional_t<kGather, std::byte*, const std::byte*>;

  static void copy(std::byte* place, Packed packed, std::size_t bytes) noexcept {
    if constexpr (kGather) {
      std::memcpy(packed, place, bytes);
    } else {
      std::memcpy(place, packed, bytes);
    }
  }

  static void prefetch(const BlockLayout& layout, const Piece& piece) noexcept {
    const std::size_t run =
        layout.tokens_contiguous() ? piece.count * layout.fragment_bytes : layout.fragment_bytes;
    if (run > kPrefetchBytes) return;
    const std::byte* first = piece.block + piece.token * layout.token_stride;
    for (const std::size_t offset : layout.fragment_offsets) {
      for (std::size_t line = 0; line < run; line += kLine) {
        __builtin_prefetch(first + offset + line, kGather ? 0 : 1);
      }
    }
  }

  static void run(const BlockLayout& layout, const LayerMemory& memory,
                  std::span<const SlotRange> ranges, Packed packed) noexcept {
    const bool whole = block_is_canonical(layout);
    const bool contiguous = layout.tokens_contiguous();
    const std::size_t slot_lines = std::max<std::size_t>(1, layout.slot_bytes() / kLine);
    Cursor cursor(layout, memory, ranges);
    Cursor ahead(layout, memory, ranges);
    Piece piece;
    Piece later;
    for (std::size_t lines = 0; lines < kAhead && ahead.next(later);) {
      prefetch(layout, later);
      lines += slot_lines * later.count;
    }
    while (cursor.next(piece)) {
      if (ahead.next(later)) prefetch(layout, later);
      if (whole && piece.count == layout.block_size) {
        const std::size_t bytes = layout.slot_bytes() * layout.block_size;
        copy(piece.block, packed, bytes);
        packed += bytes;
        continue;
      }
      const std::size_t bytes = kBytes != 0 ? kBytes : layout.fragment_bytes;
      std::byte* const first = piece.block + piece.token * layout.token_stride;
      if (contiguous && piece.count > 1) {
        const std::size_t long_run = bytes * piece.count;
        for (const std::size_t offset : layout.fragment_offsets) {
          copy(first + offset, packed, long_run);
          packed += long_run;
        }
        continue;
      }
      for (const std::size_t offset : layout.fragment_offsets) {
        std::byte* place = first + offset;
        for (std::uint32_t t = 0; t < piece.count; ++t, place += layout.token_stride) {
          copy(place, packed, bytes);
          packed += bytes;
        }
      }
    }
  }
};

template <bool kGather>
void move(const BlockLayout& layout, const LayerMemory& memory, std::span<const SlotRange> ranges,
          typename Mover<kGather, 0>::Packed packed) noexcept {
  switch (layout.fragment_bytes) {
    case 64:
      return Mover<kGather, 64>::run(layout, memory, ranges, packed);
    case 128:
      return Mover<kGather, 128>::run(layout, memory, ranges, packed);
    case 256:
      return Mover<kGather, 256>::run(layout, memory, ranges, packed);
    default:
      return Mover<kGather, 0>::run(layout, memory, ranges, packed);
  }
}

std::uint64_t check(const BlockLayout& layout, const LayerMemory& memory,
                    std::span<const SlotRange> ranges) {
  return count_slots(ranges, memory.num_blocks * layout.block_size);
}

void check_size(const BlockLayout& layout, std::uint64_t slots, std::size_t size) {
  if (size != slots * layout.slot_bytes()) {
    throw Error(ErrorCode::invalid_argument,
                "the packed buffer has " + std::to_string(size) + " bytes, expected " +
                    std::to_string(slots * layout.slot_bytes()) + " for " + std::to_string(slots) +
                    " slots of " + std::to_string(layout.slot_bytes()) + " bytes");
  }
}

}  // namespace

std::uint64_t count_slots(std::span<const SlotRange> ranges, std::uint64_t num_slots) {
  std::uint64_t slots = 0;
  for (const SlotRange& range : ranges) {
    if (range.count > num_slots || range.begin > num_slots - range.count) {
      throw Error(ErrorCode::invalid_argument,
                  "slot range [" + std::to_string(range.begin) + ", +" +
                      std::to_string(range.count) + ") ends after slot " +
                      std::to_string(num_slots) + ", the first that is not there");
    }
    slots += range.count;
  }
  return slots;
}

void gather(const BlockLayout& layout, const LayerMemory& memory, std::span<const SlotRange> ranges,
            std::span<std::byte> out) {
  check_size(layout, check(layout, memory, ranges), out.size());
  move<true>(layout, memory, ranges, out.data());
}

void scatter(const BlockLayout& layout, const LayerMemory& memory,
             std::span<const SlotRange> ranges, std::span<const std::byte> in) {
  check_size(layout, check(layout, memory, ranges), in.size());
  move<false>(layout, memory, ranges, in.data());
}

void scatter_part(const BlockLayout& layout, const LayerMemory& memory, SlotRange range,
                  std::span<const std::byte> in, SlotRange part) {
  check_size(layout, check(layout, memory, {&range, 1}), in.size());
  if (part.begin < range.begin || part.count > range.end() ||
      part.begin > range.end() - part.count) {
    throw Error(ErrorCode::invalid_argument,
                "slots [" + std::to_string(part.begin) + ", +" + std::to_string(part.count) +
                    ") are not a part of [" + std::to_string(range.begin) + ", +" +
                    std::to_string(range.count) + ")");
  }
  const std::size_t bytes = layout.fragment_bytes;
  const std::byte* packed = in.data();
  std::uint64_t slot = range.begin;
  while (slot < range.end()) {
    const std::uint64_t token = slot % layout.block_size;
    const std::uint64_t count = std::min(layout.block_size - token, range.end() - slot);
    const std::uint64_t first = std::max(slot, part.begin);
    const std::uint64_t last = std::min(slot + count, part.end());
    std::byte* const block = memory.base + slot / layout.block_size * memory.block_stride;
    for (const std::size_t offset : layout.fragment_offsets) {
      for (std::uint64_t s = first; s < last; ++s) {
        std::memcpy(block + offset + s % layout.block_size * layout.token_stride,
                    packed + (s - slot) * bytes, bytes);
      }
      packed += count * bytes;
    }
    slot += count;
  }
}

namespace {

constexpr std::size_t kCachedBytes = 64 * 1024;

// Calls `use` with groups of ranges of about kCachedBytes. Long ranges are cut at block boundaries,
// where the canonical order does not see the cut.
template <typename Use>
void in_cached_groups(const BlockLayout& layout, std::span<const SlotRange> ranges,
                      const Use& use) {
  const std::size_t slot_bytes = layout.slot_bytes();
  const std::uint64_t block = layout.block_size;
  const std::uint64_t most =
      std::max<std::uint64_t>(1, kCachedBytes / (slot_bytes * block)) * block;
  std::size_t first = 0;
  std::uint64_t slots = 0;
  const auto flush = [&](std::size_t end) {
    if (slots != 0) use(ranges.subspan(first, end - first), slots);
    first = end;
    slots = 0;
  };
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (slots + ranges[i].count > most) flush(i);
    if (ranges[i].count <= most) {
      slots += ranges[i].count;
      continue;
    }
    for (SlotRange rest = ranges[i]; rest.count != 0;) {
      const SlotRange piece{rest.begin, std::min(rest.count, most - rest.begin % block)};
      use(std::span<const SlotRange>(&piece, 1), piece.count);
      rest.begin += piece.count;
      rest.count -= piece.count;
    }
    first = i + 1;
  }
  flush(ranges.size());
}

}  // namespace

std::uint32_t gather_crc(const BlockLayout& layout, const LayerMemory& memory,
                         std::span<const SlotRange> ranges, std::span<std::byte> out,
                         std::uint32_t seed) {
  check_size(layout, check(layout, memory, ranges), out.size());
  std::byte* packed = out.data();
  in_cached_groups(layout, ranges, [&](std::span<const SlotRange> group, std::uint64_t slots) {
    const std::size_t bytes = slots * layout.slot_bytes();
    move<true>(layout, memory, group, packed);
    seed = crc32c({packed, bytes}, seed);
    packed += bytes;
  });
  return seed;
}

std::uint32_t digest(const BlockLayout& layout, const LayerMemory& memory,
                     std::span<const SlotRange> ranges, std::uint32_t seed) {
  static_cast<void>(check(layout, memory, ranges));
  std::vector<std::byte> scratch;
  in_cached_groups(layout, ranges, [&](std::span<const SlotRange> group, std::uint64_t slots) {
    const std::size_t bytes = slots * layout.slot_bytes();
    if (scratch.size() < bytes) scratch.resize(bytes);
    move<true>(layout, memory, group, scratch.data());
    seed = crc32c({scratch.data(), bytes}, seed);
  });
  return seed;
}

}  // namespace pipelive
