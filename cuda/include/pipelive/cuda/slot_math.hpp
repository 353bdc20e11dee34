#pragma once

#include "pipelive/cuda/portable.hpp"

/// Where the bytes of packed slots lie in memory, for the kernels that gather and scatter them.
///
/// Packed order (see transport/slot_copy.hpp): record by record; in a record block by block; in a
/// block fragment by fragment; in a fragment token by token. All lengths are in *vectors*: the
/// largest power of two of bytes, up to 16, that divides every address, stride and length of a
/// call.
namespace pipelive::cuda {

/// The shape of a slot; the same for all layers of a call.
struct SlotShape {
  u32 block_size;        ///< tokens per block
  u32 fragment_vectors;  ///< of one token in one fragment
  u32 slot_vectors;      ///< of one token: fragment_vectors times the fragments
  u32 vector_bytes;
};

/// One layer's memory; bytes and addresses.
struct SlotLayer {
  u64 base;
  u64 block_stride;
  u64 token_stride;
  u32 first_offset;  ///< of its fragments, in the table of offsets
  u32 padding;
};

/// A slot range of one layer. The host keeps every record below 2^31 vectors.
struct SlotRecord {
  u64 packed;      ///< vectors before it in the packed order
  u32 block;       ///< of its first slot
  u32 token;       ///< of its first slot, in that block
  u32 count;       ///< slots
  u32 layer;       ///< in the table of layers
  u32 keep_begin;  ///< slots [keep_begin, keep_end) of it are copied, the others passed over
  u32 keep_end;
};

/// The tables of one call, in the memory of the device.
struct SlotTable {
  SlotShape shape;
  u32 num_records;
  u32 padding;
  u64 layers;   ///< SlotLayer[]
  u64 offsets;  ///< u64[]: fragment offsets in bytes
  u64 records;  ///< SlotRecord[num_records], by `packed`
};

struct SlotSpot {
  u64 address;
  u32 slot;  ///< of the record, from 0
};

/// Where vector number `vector` of a record lies.
PIPELIVE_HD SlotSpot spot_of(const SlotShape& shape, const SlotLayer& layer, const u64* offsets,
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
    const u32 whole = rest / block_vectors;
    rest -= whole * block_vectors;
    block = 1 + whole;
    first = head + whole * shape.block_size;
    const u32 left = record.count - first;
    tokens = left < shape.block_size ? left : shape.block_size;
  }
  const u32 run = tokens * shape.fragment_vectors;  // of one fragment in this block
  const u32 fragment = rest / run;
  rest -= fragment * run;
  const u32 token = rest / shape.fragment_vectors;
  rest -= token * shape.fragment_vectors;
  const u32 first_token = block == 0 ? record.token : 0;
  SlotSpot spot;
  spot.address = layer.base + (static_cast<u64>(record.block) + block) * layer.block_stride +
                 offsets[layer.first_offset + fragment] +
                 (first_token + token) * layer.token_stride +
                 static_cast<u64>(rest) * shape.vector_bytes;
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

inline constexpr u32 kCopyThreads = 256;
inline constexpr u32 kCopyUnroll = 4;
/// Vectors that one thread block copies.
inline constexpr u32 kCopyTile = kCopyThreads * kCopyUnroll;

/// One call of the gather or scatter kernel: the packed vectors [begin, end), all of them in
/// records; vector `begin` is the first one at `packed`.
struct SlotCopyArgs {
  SlotTable table;
  u64 packed;  ///< address, aligned to a vector
  u64 begin;
  u64 end;
};

/// What one thread of the kernel does: the vectors `thread`, thread + kCopyThreads, ... of a tile.
template <typename Vector, bool kGather>
PIPELIVE_HD void copy_tile(const SlotCopyArgs& args, u64 tile, u32 thread) {
  const SlotRecord* records = at_address<const SlotRecord>(args.table.records);
  const SlotLayer* layers = at_address<const SlotLayer>(args.table.layers);
  const u64* offsets = at_address<const u64>(args.table.offsets);
  Vector* packed = at_address<Vector>(args.packed);
  const u64 first = args.begin + tile * kCopyTile;
  if (first >= args.end) return;
  const u64 last = (args.end - first < kCopyTile ? args.end : first + kCopyTile) - 1;
  const u32 low = find_record(records, 0, args.table.num_records, first);
  const u32 high = find_record(records, low, args.table.num_records, last) + 1;

  // All loads of a thread are under way before its first store.
  Vector value[kCopyUnroll];
  Vector* to[kCopyUnroll];
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    const u64 index = first + k * kCopyThreads + thread;
    to[k] = nullptr;
    if (index > last) continue;
    const SlotRecord record = records[find_record(records, low, high, index)];
    const SlotSpot spot = spot_of(args.table.shape, layers[record.layer], offsets, record,
                                  static_cast<u32>(index - record.packed));
    Vector* const place = at_address<Vector>(spot.address);
    Vector* const line = packed + (index - args.begin);
    if (kGather) {
      to[k] = line;
      value[k] = *place;
    } else if (spot.slot >= record.keep_begin && spot.slot < record.keep_end) {
      to[k] = place;
      value[k] = *line;
    }
  }
  PIPELIVE_UNROLL
  for (u32 k = 0; k < kCopyUnroll; ++k) {
    if (to[k] != nullptr) *to[k] = value[k];
  }
}

}  // namespace pipelive::cuda
