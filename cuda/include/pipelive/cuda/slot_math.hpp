#pragma once

#include "pipelive/cuda/portable.hpp"

/// Where the bytes of packed slots lie in memory, for the kernels that gather and scatter them.
///
/// Packed order (see transport/slot_copy.hpp): record by record; in a record block by block; in a
/// block fragment by fragment; in a fragment token by token. All lengths are in *vectors*: the
/// largest power of two of bytes, up to 16, that divides every address, stride and length of a
/// call.
namespace pipelive::cuda {

inline constexpr u32 kCopyThreads = 256;
inline constexpr u32 kCopyUnroll = 4;
/// Vectors that one thread block copies.
inline constexpr u32 kCopyTile = kCopyThreads * kCopyUnroll;

/// The shape of a slot; the same for all layers of a call.
struct SlotShape {
  u32 block_size;        ///< tokens per block
  u32 fragment_vectors;  ///< of one token in one fragment
  u32 slot_vectors;      ///< of one token: fragment_vectors times the fragments
  u32 vector_bytes;
  u32 fragment_shift;  ///< shift_of(fragment_vectors)
  u32 block_shift;     ///< shift_of(block_size * slot_vectors)
  u32 tile_records;    ///< records that one tile of the copy kernels can touch, at most
};
PIPELIVE_HD SlotShape shape_of(u32 block_size, u32 fragment_vectors, u32 slot_vectors,
                               u32 vector_bytes) {
  SlotShape shape;
  shape.block_size = block_size;
  shape.fragment_vectors = fragment_vectors;
  shape.slot_vectors = slot_vectors;
  shape.vector_bytes = vector_bytes;
  shape.fragment_shift = shift_of(fragment_vectors);
  shape.block_shift = shift_of(block_size * slot_vectors);
  // No record is shorter than a slot, and a tile begins and ends anywhere in one.
  shape.tile_records = (kCopyTile - 1) / slot_vectors + 2;
  return shape;
}

/// One layer's memory; bytes and addresses. Aligned, as records are, so that two accesses load one.
struct alignas(16) SlotLayer {
  u64 base;
  u64 block_stride;
  u64 token_stride;
  u32 first_offset;  ///< of its fragments, in the table of offsets
  u32 padding;
};

/// A slot range of one layer. The host keeps every record below 2^31 vectors.
struct alignas(16) SlotRecord {
  u64 packed;      ///< vectors before it in the packed order
  u32 block;       ///< of its first slot
  u32 token;       ///< of its first slot, in that block
  u32 count;       ///< slots
  u32 layer;       ///< in the table of layers
  u32 keep_begin;  ///< slots [keep_begin, keep_end) of it are copied, the others passed over
  u32 keep_end;
};

static_assert(sizeof(SlotLayer) == 32 && sizeof(SlotRecord) == 32);

/// The tables of one call, in the memory of the device.
struct SlotTable {
  SlotShape shape;
  u32 num_records;
  u64 layers;   ///< SlotLayer[]
  u64 offsets;  ///< u64[]: fragment offsets in bytes
  u64 records;  ///< SlotRecord[num_records], by `packed`
};

struct SlotSpot {
  u64 address;   ///< without the offset of the fragment
  u32 fragment;  ///< in the table of offsets
  u32 slot;      ///< of the record, from 0
};

/// Where vector number `vector` of a record lies.
PIPELIVE_HD SlotSpot spot_of(const SlotShape& shape, const SlotLayer& layer,
                             const SlotRecord& record, u32 vector) {
  const u32 room = shape.block_size - record.token;
  const u32 head = record.count < room ? record.count : room;  // slots in its first block
  const u32 head_vectors = head * shape.slot_vectors;
  u32 block = 0;  // after the record's first
  u32 first = 0;  // slots of the record before this block
  u32 tokens = head;
  u32 rest = vector;
  if (vector >= head_vectors) {
    const u32 block_vectors = shape.block_size * shape.slot_vectors;
    rest = vector - head_vectors;
    const u32 whole = quotient(rest, block_vectors, shape.block_shift);
    rest -= whole * block_vectors;
    block = 1 + whole;
    first = head + whole * shape.block_size;
    const u32 left = record.count - first;
    tokens = left < shape.block_size ? left : shape.block_size;
  }
  const u32 run = tokens * shape.fragment_vectors;  // of one fragment in this block
  const u32 tokens_shift = shape.fragment_shift < kNoShift ? shift_of(tokens) : kNoShift;
  const u32 run_shift =
      tokens_shift < kNoShift ? tokens_shift + shape.fragment_shift : kNoShift;  // below 31
  const u32 fragment = quotient(rest, run, run_shift);
  rest -= fragment * run;
  const u32 token = quotient(rest, shape.fragment_vectors, shape.fragment_shift);
  rest -= token * shape.fragment_vectors;
  const u32 first_token = block == 0 ? record.token : 0;
  SlotSpot spot;
  spot.address = layer.base + (static_cast<u64>(record.block) + block) * layer.block_stride +
                 (first_token + token) * layer.token_stride +
                 static_cast<u64>(rest) * shape.vector_bytes;
  spot.fragment = layer.first_offset + fragment;
  spot.slot = first + token;
  return spot;
}

/// The last record in [low, high) that begins at or before packed vector `index`; the record `low`
/// does.
PIPELIVE_HD u32 find_record(const SlotRecord* records, u32 low, u32 high, u64 index) {
  while (high - low > 1) {
    const u32 middle = low + (high - low) / 2;
    if (records[middle].packed <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct alignas(16) Vector16 {
  u32 x, y, z, w;
};
static_assert(sizeof(Vector16) == 16);

/// One call of the gather or scatter kernel: the packed vectors [begin, end), all of them in
/// records; vector `begin` is the first one at `packed`.
struct SlotCopyArgs {
  SlotTable table;
  u64 packed;  ///< address, aligned to a vector
  u64 begin;
  u64 end;
};

/// Where the vectors `thread`, thread + kCopyThreads, ... of the tile [first, last] lie; 0 where a
/// vector is beyond it, or is not copied. `low` is the record of the first; kOne: of all of them.
template <bool kGather, bool kOne>
PIPELIVE_HD void find_places(const SlotTable& table, u32 low, u64 first, u64 last, u32 thread,
                             u64 (&place)[kCopyUnroll]) {
  const SlotRecord* records = at_address<const SlotRecord>(table.records);
  const SlotLayer* layers = at_address<const SlotLayer>(table.layers);
  const u64* offsets = at_address<const u64>(table.offsets);
  u64 index[kCopyUnroll];
  u32 at[kCopyUnroll];
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    const u64 wanted = first + k * kCopyThreads + thread;
    index[k] = wanted < last ? wanted : last;  // looked up in any case, so that nothing branches
    at[k] = low;
  }
  SlotRecord record[kCopyUnroll];
  SlotLayer layer;
  if (kOne) {
    record[0] = records[low];
    layer = layers[record[0].layer];
  } else {
    // All the searches go step by step together: their loads are under way at a time.
    const u32 there = table.num_records - low;
    u32 size = there < table.shape.tile_records ? there : table.shape.tile_records;
    while (size > 1) {
      const u32 half = size / 2;
      u64 begin[kCopyUnroll];
      PIPELIVE_UNROLL
      for (u32 k = 0; k < kCopyUnroll; ++k) begin[k] = records[at[k] + half].packed;
      PIPELIVE_UNROLL
      for (u32 k = 0; k < kCopyUnroll; ++k) at[k] += begin[k] <= index[k] ? half : 0;
      size -= half;
    }
    PIPELIVE_UNROLL
    for (u32 k = 0; k < kCopyUnroll; ++k) record[k] = records[at[k]];
  }
  u32 fragment[kCopyUnroll];
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    const SlotRecord& mine = record[kOne ? 0 : k];
    if (!kOne) layer = layers[mine.layer];
    const SlotSpot spot =
        spot_of(table.shape, layer, mine, static_cast<u32>(index[k] - mine.packed));
    const bool copied = first + k * kCopyThreads + thread <= last &&
                        (kGather || (spot.slot >= mine.keep_begin && spot.slot < mine.keep_end));
    place[k] = copied ? spot.address : 0;
    fragment[k] = spot.fragment;
  }
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    const u64 offset = offsets[fragment[k]];
    if (place[k] != 0) place[k] += offset;
  }
}

/// What one thread of the kernel does: the vectors `thread`, thread + kCopyThreads, ... of a tile.
template <typename Vector, bool kGather>
PIPELIVE_HD void copy_tile(const SlotCopyArgs& args, u64 tile, u32 thread) {
  const SlotRecord* records = at_address<const SlotRecord>(args.table.records);
  const u64 first = args.begin + tile * kCopyTile;
  if (first >= args.end) return;
  const u64 last = (args.end - first < kCopyTile ? args.end : first + kCopyTile) - 1;
  const u32 low = find_record(records, 0, args.table.num_records, first);
  // First all addresses, then all loads, then all stores: what comes before a load in this order
  // would else be waited for by the next one.
  u64 place[kCopyUnroll];
  if (low + 1 == args.table.num_records || records[low + 1].packed > last) {
    find_places<kGather, true>(args.table, low, first, last, thread, place);
  } else {
    find_places<kGather, false>(args.table, low, first, last, thread, place);
  }
  Vector* const line = at_address<Vector>(args.packed) + (first - args.begin) + thread;
  Vector value[kCopyUnroll] = {};
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    if (place[k] != 0) value[k] = kGather ? *at_address<Vector>(place[k]) : line[k * kCopyThreads];
  }
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    if (place[k] != 0)
      (kGather ? line[k * kCopyThreads] : *at_address<Vector>(place[k])) = value[k];
  }
}

}  // namespace pipelive::cuda
