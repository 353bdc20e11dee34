#include "slots_emulation.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <numeric>
#include <random>

#include "pipelive/cuda/append_math.hpp"
#include "pipelive/cuda/copy_math.hpp"
#include "pipelive/cuda/crc_math.hpp"
#include "pipelive/cuda/mark_math.hpp"
#include "pipelive/cuda/slot_math.hpp"

namespace pipelive::cuda::test {
namespace {

using Kernel = std::function<void(unsigned grid, const void* args)>;

// What the running launch of append may read, and whether it read anything else.
struct Readable {
  u64 begin = 0;
  u64 end = 0;
};
thread_local std::array<Readable, 4> readable;
thread_local bool read_beyond = false;

struct PlainMemory {
  template <typename T>
  static T fetch(const T* from) {
    const u64 begin = reinterpret_cast<std::uintptr_t>(from);
    for (const Readable& part : readable) {
      if (begin >= part.begin && begin + sizeof(T) <= part.end) return *from;
    }
    read_beyond = true;
    return T{};
  }
  static void set_bits(u32* word, u32 bits) { *word |= bits; }
  static void add(u64* number, u64 more) { *number += more; }
};

// Items in an order that no device promises, another one at each launch.
template <typename Move>
void append(unsigned grid, const void* raw) {
  static thread_local std::mt19937 random(7);
  const auto& args = *static_cast<const AppendArgs*>(raw);
  const u64 tokens = args.items / (2 * args.heads * args.row_items);
  const auto rows = [&](u64 base, i64 token_stride, i64 head_stride) {
    return Readable{base, base + (tokens - 1) * static_cast<u64>(token_stride) +
                              (args.heads - 1) * static_cast<u64>(head_stride) +
                              u64{args.row_items} * Move::kFromBytes};
  };
  readable = {rows(args.key, args.key_token_stride, args.key_head_stride),
              rows(args.value, args.value_token_stride, args.value_head_stride),
              Readable{args.slots, args.slots + tokens * sizeof(i64)},
              Readable{args.set, args.set + sizeof(u32)}};
  std::vector<u32> items(std::size_t{grid} * kAppendThreads);
  std::iota(items.begin(), items.end(), 0U);
  std::shuffle(items.begin(), items.end(), random);
  for (const u32 item : items) {
    if (item < args.items) append_item<Move, PlainMemory>(args, item);
  }
}

SlotAccess* slot_access = nullptr;
bool refused = false;

// Whether all that the kernel will touch of layers may be touched.
template <typename Vector, bool kGather>
bool accessible(const SlotCopyArgs& args) {
  if (slot_access == nullptr) return true;
  const auto* records = at_address<const SlotRecord>(args.table.records);
  const auto* layers = at_address<const SlotLayer>(args.table.layers);
  const auto* offsets = at_address<const u64>(args.table.offsets);
  for (u64 index = args.begin; index < args.end; ++index) {
    const SlotRecord& record = records[find_record(records, 0, args.table.num_records, index)];
    const SlotSpot spot = spot_of(args.table.shape, layers[record.layer], record,
                                  static_cast<u32>(index - record.packed));
    const bool copied = kGather || (spot.slot >= record.keep_begin && spot.slot < record.keep_end);
    const u64 address = spot.address + offsets[spot.fragment];
    if (copied && !slot_access(address, sizeof(Vector), !kGather)) return false;
  }
  return slot_access(args.packed, (args.end - args.begin) * sizeof(Vector), kGather);
}

template <typename Vector, bool kGather>
void copy(unsigned grid, const void* raw) {
  const auto& args = *static_cast<const SlotCopyArgs*>(raw);
  if (!accessible<Vector, kGather>(args)) {
    refused = true;
    return;
  }
  for (unsigned tile = 0; tile < grid; ++tile) {
    for (u32 thread = 0; thread < kCopyThreads; ++thread) {
      copy_tile<Vector, kGather>(args, tile, thread);
    }
  }
}

void crc_tiles(unsigned grid, const void* raw) {
  const auto& args = *static_cast<const CrcArgs*>(raw);
  for (unsigned block = 0; block < grid; ++block) {
    for (u32 tile = block; tile < args.tiles; tile += grid) {
      u32 sum = 0;
      for (u32 thread = 0; thread < kCrcThreads; ++thread) {
        sum ^= crc_of_thread(args, at_address<const CrcTables>(args.tables)->fold, tile, thread);
      }
      at_address<u32>(args.sums)[tile] = sum;
    }
  }
}

void marks_take(unsigned grid, const void* raw) {
  const auto& args = *static_cast<const MarkTakeArgs*>(raw);
  u32* taken = at_address<u32>(args.taken);
  for (unsigned chunk = 0; chunk < grid; ++chunk) {
    const u64 first = u64{chunk} * kChunkWords;
    for (u32 thread = 0; thread < kMarkThreads; ++thread) {
      const u64 index = first + thread * kMarkWords;
      at_address<MarkQuad>(args.taken)[index / kMarkWords] = take_words(args.sets, index);
    }
    u32 runs = 0;
    for (u32 thread = 0; thread < kMarkThreads; ++thread) {
      const u64 index = first + thread * kMarkWords;
      MarkWindow window = window_of(taken, index, first + kChunkWords);
      if (thread == 0) window.carry = 0;
      runs += count_begins(window);
    }
    at_address<u32>(args.chunks)[chunk] =
        chunk_summary(runs, taken[first] & 1U, taken[first + kChunkWords - 1] >> 31);
  }
}

void marks_fold(unsigned grid, const void* raw) {
  const auto& args = *static_cast<const MarkFoldArgs*>(raw);
  for (u64 index = 0; index < u64{grid} * kChunkWords; index += kMarkWords) {
    const MarkQuad more = take_words(args.sets, index);
    MarkQuad& into = at_address<MarkQuad>(
        args.sets.words)[(args.into * args.sets.set_words + index) / kMarkWords];
    for (u32 w = 0; w < kMarkWords; ++w) {
      *at_address<u64>(args.fresh) += count_ones(more.word[w] & ~into.word[w]);
      into.word[w] |= more.word[w];
    }
  }
}

void marks_emit(unsigned grid, const void* raw) {
  const auto& args = *static_cast<const MarkEmitArgs*>(raw);
  const u32* chunks = at_address<const u32>(args.chunks);
  const u64 words = u64{args.num_chunks} * kChunkWords;
  for (unsigned chunk = 0; chunk < grid; ++chunk) {
    u64 begin = 0;
    u64 end = 0;
    for (unsigned c = 0; c < chunk; ++c) {
      begin += begins_in_chunk(chunks[c], c > 0 ? chunks[c - 1] : 0);
      end += ends_in_chunk(chunks[c], chunks[c + 1]);
    }
    for (u32 thread = 0; thread < kMarkThreads; ++thread) {
      const u64 index = u64{chunk} * kChunkWords + thread * kMarkWords;
      const MarkWindow window = window_of(at_address<const u32>(args.taken), index, words);
      emit_runs(window, index, begin, end, at_address<u64>(args.ranges), args.most);
      begin += count_begins(window);
      end += count_ends(window);
    }
    if (chunk + 1 == args.num_chunks) *at_address<u64>(args.total) = begin;
  }
}

void copy_many(unsigned grid, const void* raw) {
  const auto& args = *static_cast<const CopyManyArgs*>(raw);
  for (unsigned block = 0; block < grid; ++block) {
    for (u32 thread = 0; thread < kCopyManyThreads; ++thread) copy_entry(args, block, thread);
  }
}

struct Entry {
  unsigned threads;
  std::size_t bytes;
  Kernel run;
};

const std::map<std::string, Entry>& kernels() {
  static const std::map<std::string, Entry> all{
      {"pipelive_append_16", {kAppendThreads, sizeof(AppendArgs), append<MoveRaw<Vector16>>}},
      {"pipelive_append_4", {kAppendThreads, sizeof(AppendArgs), append<MoveRaw<u32>>}},
      {"pipelive_append_2", {kAppendThreads, sizeof(AppendArgs), append<MoveRaw<u16>>}},
      {"pipelive_append_bfloat16_4",
       {kAppendThreads, sizeof(AppendArgs), append<MoveNarrow4<NarrowToBfloat16>>}},
      {"pipelive_append_bfloat16_1",
       {kAppendThreads, sizeof(AppendArgs), append<MoveNarrow1<NarrowToBfloat16>>}},
      {"pipelive_append_float16_4",
       {kAppendThreads, sizeof(AppendArgs), append<MoveNarrow4<NarrowToFloat16>>}},
      {"pipelive_append_float16_1",
       {kAppendThreads, sizeof(AppendArgs), append<MoveNarrow1<NarrowToFloat16>>}},
      {"pipelive_gather_16", {kCopyThreads, sizeof(SlotCopyArgs), copy<Vector16, true>}},
      {"pipelive_gather_8", {kCopyThreads, sizeof(SlotCopyArgs), copy<u64, true>}},
      {"pipelive_gather_4", {kCopyThreads, sizeof(SlotCopyArgs), copy<u32, true>}},
      {"pipelive_gather_2", {kCopyThreads, sizeof(SlotCopyArgs), copy<u16, true>}},
      {"pipelive_gather_1", {kCopyThreads, sizeof(SlotCopyArgs), copy<unsigned char, true>}},
      {"pipelive_scatter_16", {kCopyThreads, sizeof(SlotCopyArgs), copy<Vector16, false>}},
      {"pipelive_scatter_8", {kCopyThreads, sizeof(SlotCopyArgs), copy<u64, false>}},
      {"pipelive_scatter_4", {kCopyThreads, sizeof(SlotCopyArgs), copy<u32, false>}},
      {"pipelive_scatter_2", {kCopyThreads, sizeof(SlotCopyArgs), copy<u16, false>}},
      {"pipelive_scatter_1", {kCopyThreads, sizeof(SlotCopyArgs), copy<unsigned char, false>}},
      {"pipelive_copy_many", {kCopyManyThreads, sizeof(CopyManyArgs), copy_many}},
      {"pipelive_crc_tiles", {kCrcThreads, sizeof(CrcArgs), crc_tiles}},
      {"pipelive_marks_take", {kMarkThreads, sizeof(MarkTakeArgs), marks_take}},
      {"pipelive_marks_fold", {kMarkThreads, sizeof(MarkFoldArgs), marks_fold}},
      {"pipelive_marks_emit", {kMarkThreads, sizeof(MarkEmitArgs), marks_emit}},
  };
  return all;
}

}  // namespace

bool emulate_slot_kernel(const std::string& name, unsigned grid, unsigned block,
                         void** parameters) {
  const auto found = kernels().find(name);
  if (found == kernels().end() || block != found->second.threads || grid == 0) return false;
  refused = false;
  read_beyond = false;
  found->second.run(grid, parameters[0]);
  return !refused && !read_beyond;
}

void check_slot_access(SlotAccess* check) {
  slot_access = check;
}

std::size_t slot_kernel_bytes(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? 0 : found->second.bytes;
}

const std::vector<std::string>& slot_kernel_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const auto& [name, entry] : kernels()) all.push_back(name);
    return all;
  }();
  return names;
}

}  // namespace pipelive::cuda::test
