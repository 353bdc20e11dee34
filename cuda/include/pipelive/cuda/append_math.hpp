#pragma once

#include "pipelive/cuda/portable.hpp"
#include "pipelive/cuda/slot_math.hpp"

/// What one thread of the append kernel does. A *row* is one token's key or value of one head.
namespace pipelive::cuda {

inline constexpr u32 kAppendThreads = 256;

/// One call of an append kernel. Strides are in bytes.
struct AppendArgs {
  u64 kv;
  u64 key;
  u64 value;
  u64 slots;  ///< i64[tokens]
  i64 block_stride;
  i64 head_stride;
  i64 kv_stride;
  i64 token_stride;
  i64 key_token_stride;
  i64 key_head_stride;
  i64 value_token_stride;
  i64 value_head_stride;
  u64 num_slots;  ///< slots from here on are not written
  u32 items;      ///< tokens * heads * 2 * row_items, below 2^31
  u32 heads;
  u32 row_items;  ///< items of one row
  u32 block_size;
  u32 token_shift;  ///< shift_of(2 * heads * row_items)
  u32 row_shift;    ///< shift_of(row_items)
  u32 block_shift;  ///< shift_of(block_size)
  u32 padding;
  u64 marks;      ///< u32[]: all sets of marks; 0: none are made
  u64 set_words;  ///< words of a set
  u64 set;        ///< u32: which set to mark in, read by every launch
  u64 skipped;    ///< u64: counts slots that were out of range; 0: not counted
};

/// Where an item's first element is read, and what it is part of.
struct AppendSource {
  u64 from;
  u32 token;
  u32 head;
  u32 is_value;
  u32 rest;   ///< items of the row before it
  u32 first;  ///< 1 for the one item of a token that does what is done once per token
};

PIPELIVE_HD AppendSource append_source(const AppendArgs& args, u32 item, u32 from_bytes) {
  const u32 token_items = 2 * args.heads * args.row_items;
  AppendSource source;
  source.token = quotient(item, token_items, args.token_shift);
  source.rest = item - source.token * token_items;
  source.first = source.rest == 0 ? 1 : 0;
  const u32 row = quotient(source.rest, args.row_items, args.row_shift);
  source.rest -= row * args.row_items;
  source.is_value = row >= args.heads ? 1 : 0;
  source.head = source.is_value != 0 ? row - args.heads : row;
  const u64 base = source.is_value != 0 ? args.value : args.key;
  const i64 token_stride = source.is_value != 0 ? args.value_token_stride : args.key_token_stride;
  const i64 head_stride = source.is_value != 0 ? args.value_head_stride : args.key_head_stride;
  source.from = base + static_cast<u64>(source.token * token_stride + source.head * head_stride) +
                static_cast<u64>(source.rest) * from_bytes;
  return source;
}

/// Where an item's first element is written.
PIPELIVE_HD u64 append_target(const AppendArgs& args, const AppendSource& source, u64 slot,
                              u32 to_bytes) {
  const u64 block = args.block_shift < kNoShift ? slot >> args.block_shift : slot / args.block_size;
  const u64 offset = slot - block * args.block_size;
  return args.kv + block * static_cast<u64>(args.block_stride) +
         offset * static_cast<u64>(args.token_stride) +
         source.head * static_cast<u64>(args.head_stride) +
         source.is_value * static_cast<u64>(args.kv_stride) +
         static_cast<u64>(source.rest) * to_bytes;
}

/// float32 to bfloat16, to nearest even; a NaN stays one.
PIPELIVE_HD u16 to_bfloat16(float value) {
  union {
    float number;
    u32 bits;
  } both;
  both.number = value;
  const u32 bits = both.bits;
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<u16>((bits >> 16) | 0x40U);
  return static_cast<u16>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

/// float32 to float16, to nearest even; too large becomes infinite, a NaN stays one.
PIPELIVE_HD u16 to_float16(float value) {
  union {
    float number;
    u32 bits;
  } both;
  both.number = value;
  const u32 sign = (both.bits >> 16) & 0x8000U;
  const u32 magnitude = both.bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<u16>(sign | 0x7E00U);
  if (magnitude >= 0x47800000U) return static_cast<u16>(sign | 0x7C00U);  // 65,536 and above
  const u32 exponent = magnitude >> 23;
  if (exponent < 102) return static_cast<u16>(sign);  // below 2^-25: half of the least, or less
  if (exponent < 113) {                               // a subnormal, or what rounds up to normal
    const u32 mantissa = (magnitude & 0x7FFFFFU) | 0x800000U;
    const u32 shift = 126 - exponent;  // 14 to 24
    const u32 kept = mantissa >> shift;
    const u32 cut = mantissa & ((1U << shift) - 1);
    const u32 half = 1U << (shift - 1);
    const u32 up = cut > half || (cut == half && (kept & 1U) != 0) ? 1 : 0;
    return static_cast<u16>(sign | (kept + up));
  }
  // A carry out of the mantissa goes into the exponent, and from the largest number to infinity.
  const u32 rebased = magnitude - ((127U - 15U) << 23);
  return static_cast<u16>(sign | ((rebased + 0xFFFU + ((rebased >> 13) & 1U)) >> 13));
}

/// Rounds `kNumbers` floats and writes them. kAligned: both sides are multiples of what is moved.
struct alignas(16) Floats4 {
  float x, y, z, w;
};
struct alignas(8) Halves4 {
  u16 x, y, z, w;
};

struct NarrowToBfloat16 {
  PIPELIVE_HD static u16 narrow(float value) { return to_bfloat16(value); }
};
struct NarrowToFloat16 {
  PIPELIVE_HD static u16 narrow(float value) { return to_float16(value); }
};

/// What one item moves, and how it is loaded and stored: raw bytes.
template <typename Vector>
struct MoveRaw {
  static constexpr u32 kFromBytes = sizeof(Vector);
  static constexpr u32 kToBytes = sizeof(Vector);
  using Value = Vector;
  PIPELIVE_HD static void store(u64 to, const Value& v) { *at_address<Vector>(to) = v; }
};
/// Four floats, narrowed; 16 bytes aligned where they are read, 8 where they are written.
template <typename Narrow>
struct MoveNarrow4 {
  static constexpr u32 kFromBytes = 16;
  static constexpr u32 kToBytes = 8;
  using Value = Floats4;
  PIPELIVE_HD static void store(u64 to, const Value& in) {
    *at_address<Halves4>(to) = Halves4{Narrow::narrow(in.x), Narrow::narrow(in.y),
                                       Narrow::narrow(in.z), Narrow::narrow(in.w)};
  }
};
template <typename Narrow>
struct MoveNarrow1 {
  static constexpr u32 kFromBytes = 4;
  static constexpr u32 kToBytes = 2;
  using Value = float;
  PIPELIVE_HD static void store(u64 to, const Value& in) {
    *at_address<u16>(to) = Narrow::narrow(in);
  }
};

/// One item. `Memory` offers the atomic operations set_bits(u32*, u32) and add(u64*, u64), and
/// fetch(const T*), a load that a compiler leaves where it is.
template <typename Move, typename Memory>
PIPELIVE_HD void append_item(const AppendArgs& args, u32 item) {
  using Value = typename Move::Value;
  const AppendSource source = append_source(args, item, Move::kFromBytes);
  // All three loads are under way at a time; behind the slot, each would be waited for once more.
  // The source is there whatever the slot. Only the items that mark ask for the set: of all of
  // them, a long prompt's would queue for the one word.
  const i64 slot = Memory::fetch(at_address<const i64>(args.slots) + source.token);
  const Value value = Memory::fetch(at_address<const Value>(source.from));
  const bool marks = source.first != 0 && args.marks != 0;
  u32 set = 0;
  if (marks) set = Memory::fetch(at_address<const u32>(args.set));
  if (slot < 0 || static_cast<u64>(slot) >= args.num_slots) {
    if (slot != -1 && source.first != 0 && args.skipped != 0) {
      Memory::add(at_address<u64>(args.skipped), 1);
    }
    return;
  }
  Move::store(append_target(args, source, static_cast<u64>(slot), Move::kToBytes), value);
  // Behind the store, which then does not wait for the set.
  if (marks) {
    Memory::set_bits(
        at_address<u32>(args.marks) + set * args.set_words + static_cast<u64>(slot) / 32,
        1U << (static_cast<u64>(slot) % 32));
  }
}

}  // namespace pipelive::cuda
