// What the slot kernels compute, run on the CPU against the host's own implementation.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/append_math.hpp"
#include "pipelive/cuda/crc_math.hpp"
#include "pipelive/cuda/mark_math.hpp"
#include "pipelive/cuda/slot_math.hpp"
#include "pipelive/cuda/slot_plan.hpp"
#include "pipelive/tracker/slot_bitmap.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/slot_copy.hpp"
#include "slots_emulation.hpp"
#include "transport/test_layers.hpp"

namespace pipelive::cuda {
namespace {

using pipelive::test::PlainLayer;
using pipelive::test::random_ranges;
using pipelive::test::total;
using test::emulate_slot_kernel;

template <typename T>
u64 address(T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

template <typename Args>
void run(const std::string& name, u64 grid, unsigned block, Args& args) {
  void* parameters[] = {&args};
  ASSERT_TRUE(emulate_slot_kernel(name, static_cast<unsigned>(grid), block, parameters)) << name;
}

// Moves all of a plan between its layers and `packed`, kernel by kernel and copy by copy, in pieces
// of `piece` bytes.
void execute(const SlotPlan& plan, std::byte* packed, bool gather, std::uint64_t piece) {
  // Behind the last record are zeros: to a search that reads them, a record of packed vector 0.
  std::vector<Vector16> tables(plan.table_bytes() / sizeof(Vector16) + 4);
  const SlotTable table =
      plan.write_tables(reinterpret_cast<std::byte*>(tables.data()), address(tables.data()));
  const std::uint64_t vector = plan.shape.vector_bytes;
  for (std::uint64_t first = 0; first < plan.bytes; first += piece) {
    const std::uint64_t last = std::min(plan.bytes, first + piece);
    for (const SlotPlan::Part& part : plan.parts) {
      const std::uint64_t begin = std::max(first, part.begin);
      const std::uint64_t end = std::min(last, part.end);
      if (begin >= end) continue;
      if (part.address == 0) {
        SlotCopyArgs args{table, address(packed + begin), begin / vector, end / vector};
        run((gather ? "pipelive_gather_" : "pipelive_scatter_") + std::to_string(vector),
            (args.end - args.begin + kCopyTile - 1) / kCopyTile, kCopyThreads, args);
        continue;
      }
      const std::vector<DirectCopy> copies = direct_copies(part, begin, end);
      EXPECT_LE(copies.size(), 4U);
      std::uint64_t memory_end = 0;
      for (const DirectCopy& copy : copies) {
        memory_end = std::max(memory_end, copy.address + (copy.rows - 1) * copy.pitch + copy.row);
      }
      for (const DirectCopy& copy : copies) {
        if (copy.rows == 1) continue;
        EXPECT_LE(copy.address + copy.rows * copy.pitch, memory_end);
      }
      std::uint64_t at = begin;
      for (const DirectCopy& copy : copies) {
        EXPECT_EQ(copy.packed, at);
        for (std::uint64_t row = 0; row < copy.rows; ++row, at += copy.row) {
          auto* memory = reinterpret_cast<std::byte*>(copy.address + row * copy.pitch);
          std::memcpy(gather ? packed + at : memory, gather ? memory : packed + at, copy.row);
        }
      }
      EXPECT_EQ(at, end);
    }
  }
}

struct Case {
  KVSpec spec;
  std::size_t stack;
};
class SlotKernels : public ::testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(Layouts, SlotKernels,
                         ::testing::Values(Case{{3, 64, DType::bfloat16, 16, BlockOrder::hnd}, 1},
                                           Case{{3, 64, DType::bfloat16, 16, BlockOrder::nhd}, 1},
                                           Case{{8, 128, DType::bfloat16, 16, BlockOrder::hnd}, 4},
                                           Case{{2, 80, DType::float16, 32, BlockOrder::nhd}, 2},
                                           Case{{1, 4, DType::bfloat16, 5, BlockOrder::hnd}, 3},
                                           Case{{2, 33, DType::float32, 7, BlockOrder::nhd}, 1},
                                           Case{{2, 5, DType::float16, 1, BlockOrder::hnd}, 2},
                                           Case{{1, 1, DType::bfloat16, 64, BlockOrder::hnd}, 1}));

TEST_P(SlotKernels, GatherPacksAsTheHostDoes) {
  std::mt19937_64 random(1);
  PlainLayer one(GetParam().spec, 40, GetParam().stack);
  KVSpec other_spec = GetParam().spec;
  other_spec.order = BlockOrder::hnd;
  PlainLayer two(other_spec, 25, 1);
  one.fill(1);
  two.fill(2);
  for (const std::uint64_t longest : {1ULL, 7ULL, 300ULL}) {
    const std::vector<SlotRange> first = random_ranges(random, one.slots(), 40, longest);
    const std::vector<SlotRange> second = random_ranges(random, two.slots(), 9, longest);
    const std::vector<LayerSlots> slots{{&one.layout, one.memory, first},
                                        {&two.layout, two.memory, second},
                                        {&one.layout, one.memory, second}};
    std::vector<std::byte> expected;
    for (const LayerSlots& layer : slots) {
      std::vector<std::byte> piece(total({layer.ranges.begin(), layer.ranges.end()}) *
                                   one.layout.slot_bytes());
      gather(*layer.layout, layer.memory, layer.ranges, piece);
      expected.insert(expected.end(), piece.begin(), piece.end());
    }
    for (const std::size_t direct : {std::size_t{1}, one.layout.block_bytes * 3, ~std::size_t{0}}) {
      for (const std::uint64_t piece : {std::uint64_t{1} << 30, std::uint64_t{4096}}) {
        const SlotPlan plan = plan_slots(slots, direct, true, 0);
        ASSERT_EQ(plan.bytes, expected.size());
        if (direct == ~std::size_t{0}) {
          ASSERT_EQ(plan.parts.size(), 1U);
        }
        std::vector<std::byte> packed(plan.bytes);
        execute(plan, packed.data(), true, piece);
        ASSERT_EQ(packed, expected) << longest << ' ' << direct << ' ' << piece;
      }
    }
  }
}

TEST_P(SlotKernels, ScatterIsTheInverseAndTouchesNothingElse) {
  std::mt19937_64 random(2);
  PlainLayer source(GetParam().spec, 40, GetParam().stack);
  source.fill(3);
  for (int trial = 0; trial < 6; ++trial) {
    PlainLayer target(GetParam().spec, 40, GetParam().stack);
    PlainLayer expected(GetParam().spec, 40, GetParam().stack);
    target.fill(4);
    expected.fill(4);
    const std::vector<SlotRange> ranges =
        random_ranges(random, source.slots(), 20, trial % 2 == 0 ? 3 : 200);
    std::vector<std::byte> packed(total(ranges) * source.layout.slot_bytes());
    gather(source.layout, source.memory, ranges, packed);
    scatter(expected.layout, expected.memory, ranges, packed);
    const LayerSlots slots{&target.layout, target.memory, ranges};
    execute(plan_slots({&slots, 1}, trial < 3 ? ~std::size_t{0} : 4096, trial == 3, 0),
            packed.data(), false, 1 << 14);
    ASSERT_EQ(target.bytes, expected.bytes);
  }
}

TEST_P(SlotKernels, PartWritesOnlyItsSlots) {
  std::mt19937_64 random(3);
  PlainLayer source(GetParam().spec, 8, 1);
  source.fill(5);
  for (int trial = 0; trial < 20; ++trial) {
    const SlotRange range = random_ranges(random, source.slots(), 1, 70).front();
    const std::uint64_t skip = random() % range.count;
    const SlotRange part{range.begin + skip, 1 + random() % (range.count - skip)};
    std::vector<std::byte> packed(range.count * source.layout.slot_bytes());
    gather(source.layout, source.memory, {&range, 1}, packed);
    PlainLayer target(GetParam().spec, 8, 2);
    PlainLayer expected(GetParam().spec, 8, 2);
    scatter_part(expected.layout, expected.memory, range, packed, part);
    const LayerSlots slots{&target.layout, target.memory, {&range, 1}};
    execute(plan_slots_part(slots, part, 0), packed.data(), false, 1 << 30);
    ASSERT_EQ(target.bytes, expected.bytes);
  }
}

TEST_P(SlotKernels, TilesOfManyShortRecords) {
  // Every second slot is a record of its own, so that a tile holds as many as it can; pieces of a
  // vector more than a tile let tiles begin anywhere in a record.
  PlainLayer source(GetParam().spec, 2000 / GetParam().spec.block_size, GetParam().stack);
  PlainLayer target(GetParam().spec, 2000 / GetParam().spec.block_size, GetParam().stack);
  PlainLayer expected(GetParam().spec, 2000 / GetParam().spec.block_size, GetParam().stack);
  source.fill(6);
  std::vector<SlotRange> ranges;
  for (std::uint64_t slot = 0; slot + 3 < source.slots(); slot += 3) {
    ranges.push_back({slot, 1});
    if (slot % 2 == 0) ranges.push_back({slot + 1, 1});  // beside it
  }
  std::vector<std::byte> packed(total(ranges) * source.layout.slot_bytes());
  gather(source.layout, source.memory, ranges, packed);
  scatter(expected.layout, expected.memory, ranges, packed);
  const LayerSlots from{&source.layout, source.memory, ranges};
  const LayerSlots to{&target.layout, target.memory, ranges};
  const SlotPlan plan = plan_slots({&from, 1}, ~std::size_t{0}, false, 0);
  ASSERT_EQ(plan.records.size(), ranges.size());
  const std::uint64_t piece = std::uint64_t{kCopyTile + 1} * plan.shape.vector_bytes;
  for (const std::uint64_t bytes : {piece, std::uint64_t{1} << 30}) {
    std::vector<std::byte> found(plan.bytes);
    execute(plan, found.data(), true, bytes);
    ASSERT_EQ(found, packed);
  }
  execute(plan_slots({&to, 1}, ~std::size_t{0}, false, 0), packed.data(), false, piece);
  ASSERT_EQ(target.bytes, expected.bytes);
}

TEST(SlotShape, ShiftsStandForPowersOfTwoAlone) {
  for (u32 number = 1; number < 5000; ++number) {
    EXPECT_EQ(shift_of(number) < kNoShift, std::has_single_bit(number)) << number;
    for (const u32 value : {0U, 1U, 4095U, 4096U, 0x7FFFFFFFU}) {
      EXPECT_EQ(quotient(value, number, shift_of(number)), value / number);
    }
  }
  EXPECT_EQ(shift_of(0), kNoShift);
  EXPECT_EQ(shift_of(1U << 31), 31U);
  // A slot of one vector: a tile may hold as many records as vectors.
  EXPECT_GE(shape_of(16, 1, 1, 16).tile_records, kCopyTile);
  EXPECT_EQ(shape_of(16, 8, 4096, 16).tile_records, 2U);
}

TEST(SlotPlan, RefusesWhatDoesNotFit) {
  PlainLayer layer({1, 8, DType::bfloat16, 16, BlockOrder::hnd}, 2);
  PlainLayer other({2, 8, DType::bfloat16, 16, BlockOrder::hnd}, 2);
  constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();
  for (const SlotRange& range :
       {SlotRange{29, 4}, SlotRange{32, 1}, SlotRange{kHuge, 4}, SlotRange{4, kHuge}}) {
    const LayerSlots slots{&layer.layout, layer.memory, {&range, 1}};
    EXPECT_THROW((void)plan_slots({&slots, 1}, 1, false, 0), Error);
  }
  const SlotRange fine{28, 4};
  const std::vector<LayerSlots> mixed{{&layer.layout, layer.memory, {&fine, 1}},
                                      {&other.layout, other.memory, {&fine, 1}}};
  EXPECT_THROW((void)plan_slots(mixed, 1, true, 0), Error);
  const LayerSlots slots{&layer.layout, layer.memory, {&fine, 1}};
  EXPECT_THROW((void)plan_slots_part(slots, {27, 2}, 0), Error);
  EXPECT_THROW((void)plan_slots_part(slots, {30, 3}, 0), Error);
  EXPECT_EQ(plan_slots({}, 1, true, 0).bytes, 0U);
}

TEST(SlotPlan, LongRangesAreCutAtBlocksAndVectorsFitEveryAddress) {
  // Only the addresses are computed; nothing is behind them.
  const KVSpec spec{8, 128, DType::bfloat16, 16, BlockOrder::hnd};
  const BlockLayout layout = spec.layout();
  const LayerMemory memory{reinterpret_cast<std::byte*>(0x10000000), layout.block_bytes + 2,
                           1ULL << 31};
  const SlotRange range{5, (1ULL << 33) + 3};
  const LayerSlots slots{&layout, memory, {&range, 1}};
  const SlotPlan plan = plan_slots({&slots, 1}, ~std::size_t{0}, false, 0);
  EXPECT_EQ(plan.shape.vector_bytes, 2U);  // because of the blocks' stride
  ASSERT_GT(plan.records.size(), 1U);
  std::uint64_t slot = range.begin;
  for (const SlotRecord& record : plan.records) {
    EXPECT_EQ(std::uint64_t{record.block} * 16 + record.token, slot);
    EXPECT_EQ(record.packed * 2, (slot - range.begin) * layout.slot_bytes());
    EXPECT_LT(std::uint64_t{record.count} * plan.shape.slot_vectors, 1ULL << 31);
    slot += record.count;
  }
  EXPECT_EQ(slot, range.end());
  // The last vector of the last record, by definition.
  const SlotRecord& last = plan.records.back();
  const SlotSpot spot =
      spot_of(plan.shape, plan.layers[0], last, last.count * plan.shape.slot_vectors - 1);
  const std::uint64_t end = range.end() - 1;
  EXPECT_EQ(spot.address + plan.offsets[spot.fragment],
            0x10000000 + end / 16 * memory.block_stride + layout.fragment_offsets.back() +
                end % 16 * layout.token_stride + layout.fragment_bytes - 2);
  EXPECT_EQ(plan_slots({&slots, 1}, 1, false, 4).shape.vector_bytes, 2U);
  EXPECT_EQ(plan_slots({&slots, 1}, 1, false, 1).shape.vector_bytes, 1U);
}

TEST(CrcTiles, AgreeWithTheHostForEveryLengthAndAlignment) {
  std::mt19937_64 random(4);
  CrcTables tables;
  fill_crc_tables(tables);
  std::vector<Vector16> memory(20000);
  auto* bytes = reinterpret_cast<std::byte*>(memory.data());
  for (std::size_t i = 0; i < memory.size() * 16; ++i) bytes[i] = static_cast<std::byte>(random());
  std::vector<std::size_t> sizes{1, 15, 16, 17, 4095, 4096, 4097, 65536, 65536 * 3 + 16, 300000};
  for (int i = 0; i < 20; ++i) sizes.push_back(1 + random() % 200000);
  for (const std::size_t size : sizes) {
    for (const u32 rows : {1U, 3U, 16U}) {
      const std::size_t offset = random() % 3 == 0 ? random() % 16 : 0;
      const auto seed = static_cast<std::uint32_t>(random());
      CrcArgs args{};
      args.bytes = address(bytes + offset);
      args.size = size;
      args.tables = address(&tables);
      args.rows = rows;
      args.tiles = static_cast<u32>((size + rows * kCrcRowBytes - 1) / (rows * kCrcRowBytes));
      args.by_words = (args.bytes | size) % 16 == 0 ? 1 : 0;
      std::vector<u32> sums(args.tiles);
      args.sums = address(sums.data());
      run("pipelive_crc_tiles", 1 + random() % 3, kCrcThreads, args);
      ASSERT_EQ(join_crc(args, sums.data(), seed), crc32c({bytes + offset, size}, seed))
          << size << ' ' << rows << ' ' << offset;
    }
  }
}

std::vector<SlotRange> emitted(const std::vector<u64>& ranges, u64 count) {
  std::vector<SlotRange> result;
  for (u64 i = 0; i < count; ++i) {
    result.push_back({ranges[2 * i], ranges[2 * i + 1] - ranges[2 * i]});
  }
  return result;
}

TEST(Marks, AreTakenAsMaximalRanges) {
  std::mt19937_64 random(5);
  for (int trial = 0; trial < 60; ++trial) {
    const std::uint64_t slots = 1 + random() % (trial < 40 ? 100000 : 300);
    const u64 words = mark_words(slots);
    const u32 sets = 1 + static_cast<u32>(random() % 11);  // four are loaded at a time
    std::vector<MarkQuad> memory((sets + 1) * words / kMarkWords);
    auto* bits = reinterpret_cast<u32*>(memory.data());
    SlotBitmap expected(slots);
    MarkTakeArgs take{};
    take.sets.words = address(bits);
    take.sets.set_words = words;
    // Long runs as well as single slots, over chunk borders and to the very end.
    const int marks = static_cast<int>(random() % 200);
    for (int i = 0; i < marks; ++i) {
      const std::uint64_t begin = random() % slots;
      const std::uint64_t longest = random() % 3 == 0 ? 1 : random() % 2 == 0 ? 40 : 70000;
      const std::uint64_t count = 1 + random() % std::min(slots - begin, longest);
      const u32 set = static_cast<u32>(random() % (sets + 1));
      for (std::uint64_t slot = begin; slot < begin + count; ++slot) {
        bits[set * words + slot / 32] |= 1U << (slot % 32);
      }
      if (set != 1) expected.set(begin, count);
    }
    const std::vector<u32> kept(bits + words, bits + 2 * words);
    for (u32 set = 0; set <= sets; ++set) {
      if (set != 1) take.sets.ids[take.sets.count++] = set;
    }
    std::vector<MarkQuad> taken(words / kMarkWords);
    std::vector<u32> chunks(words / kChunkWords);
    take.taken = address(taken.data());
    take.chunks = address(chunks.data());
    run("pipelive_marks_take", chunks.size(), kMarkThreads, take);
    for (u32 set = 0; set <= sets; ++set) {
      for (u64 w = 0; w < words; ++w) {
        ASSERT_EQ(bits[set * words + w], set == 1 ? kept[w] : 0) << set;
      }
    }
    std::vector<SlotRange> wanted;
    expected.drain(wanted);
    for (const u64 most : {u64{wanted.size()} + 5, u64{wanted.size() / 2}}) {
      std::vector<u64> ranges(2 * (wanted.size() + 6), 7);
      u64 count = 99;
      MarkEmitArgs emit{};
      emit.taken = take.taken;
      emit.chunks = take.chunks;
      emit.total = address(&count);
      emit.ranges = address(ranges.data());
      emit.most = most;
      emit.num_chunks = static_cast<u32>(chunks.size());
      run("pipelive_marks_emit", chunks.size(), kMarkThreads, emit);
      ASSERT_EQ(count, wanted.size());
      const u64 fit = std::min<u64>(most, count);
      ASSERT_EQ(emitted(ranges, fit),
                std::vector<SlotRange>(wanted.begin(),
                                       wanted.begin() + static_cast<std::ptrdiff_t>(fit)));
      for (u64 i = 2 * most; i < ranges.size(); ++i) ASSERT_EQ(ranges[i], 7U);
    }
  }
}

TEST(Marks, FoldMovesAndCountsWhatIsFresh) {
  const u64 words = mark_words(40000);
  ASSERT_EQ(words, 2 * kChunkWords);
  std::vector<MarkQuad> memory(3 * words / kMarkWords);
  auto* bits = reinterpret_cast<u32*>(memory.data());
  u64 fresh = 0;
  bits[0] = 0b0110;
  bits[words + 0] = 0b0011;
  bits[words + 1200] = 1;
  bits[2 * words + 0] = 0b1000;
  MarkFoldArgs args{};
  args.sets.words = address(bits);
  args.sets.set_words = words;
  args.sets.count = 2;
  args.sets.ids[0] = 1;
  args.sets.ids[1] = 2;
  args.into = 0;
  args.fresh = address(&fresh);
  run("pipelive_marks_fold", words / kChunkWords, kMarkThreads, args);
  EXPECT_EQ(fresh, 3U);
  EXPECT_EQ(bits[0], 0b1111U);
  EXPECT_EQ(bits[1200], 1U);
  for (u64 w = words; w < 3 * words; ++w) ASSERT_EQ(bits[w], 0U);
}

// float32 to a smaller type by definition: the nearest of its numbers, the even one of two.
template <typename Widen>
u16 nearest(float value, Widen&& widen) {
  u16 best = 0;
  double distance = std::numeric_limits<double>::infinity();
  for (u32 bits = 0; bits < 0x10000; ++bits) {
    const double candidate = widen(static_cast<u16>(bits));
    if (std::isnan(candidate) || std::signbit(candidate) != std::signbit(value)) continue;
    const double off = std::abs(candidate - value);
    if (off < distance || (off == distance && bits % 2 == 0)) {
      distance = off;
      best = static_cast<u16>(bits);
    }
  }
  return best;
}

double widen_bfloat16(u16 bits) {
  const float value = std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  // Infinity counts as the number after the largest, as in rounding.
  return std::isinf(value) ? std::copysign(std::ldexp(1.0, 128), value) : value;
}

double widen_float16(u16 bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  if (exponent == 31 && mantissa != 0) return std::nan("");
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -value : value;
}

TEST(Narrowing, RoundsToNearestEven) {
  std::mt19937_64 random(6);
  std::vector<float> values{
      0.0F,     -0.0F,     1.0F,       65504.0F,      65519.9F,          65520.0F,
      65536.0F, 1e30F,     -1e-30F,    5.96e-8F,      2.98023223877e-8F, 2.99e-8F,
      6.1e-5F,  6.104e-5F, 3.3895e38F, -1.0009765625F};
  for (int i = 0; i < 60; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
    values.push_back(
        std::ldexp(static_cast<float>(random() % 4096), static_cast<int>(random() % 40) - 36));
  }
  for (const float value : values) {
    if (std::isnan(value) || std::isinf(value)) continue;
    EXPECT_EQ(to_bfloat16(value), nearest(value, widen_bfloat16)) << value;
    EXPECT_EQ(to_float16(value), nearest(value, widen_float16)) << value;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_bfloat16(infinity), 0x7F80);
  EXPECT_EQ(to_float16(-infinity), 0xFC00);
  const auto nan = std::bit_cast<float>(0xFF800001U);
  EXPECT_TRUE(std::isnan(widen_float16(to_float16(nan))));
  EXPECT_TRUE(std::isnan(std::bit_cast<float>(static_cast<std::uint32_t>(to_bfloat16(nan)) << 16)));
}

}  // namespace
}  // namespace pipelive::cuda
