// Slots packed and unpacked on a GPU, and whole sessions with such layers at either end.
#include "pipelive/cuda/slot_copier.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "migration/session.hpp"
#include "pipelive/cuda/event_pool.hpp"
#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/stream.hpp"
#include "pipelive/transport/checksum.hpp"
#include "slots_fixture.hpp"
#include "transport/test_layers.hpp"

namespace pipelive::cuda {
namespace {

using pipelive::test::EndMemory;
using pipelive::test::PlainLayer;
using pipelive::test::random_ranges;
using pipelive::test::RunningReceiver;
using pipelive::test::total;
using test::shortly;
using test::soon;
using ::testing::HasSubstr;

constexpr std::size_t kLane = std::size_t{64} << 10;

CudaSlotCopier::Options small(std::size_t direct = std::size_t{1} << 15, unsigned lanes = 2) {
  CudaSlotCopier::Options options;
  options.lane_bytes = kLane;
  options.lanes = lanes;
  options.direct_bytes = direct;
  return options;
}

class CudaCopier : public test::SlotDriverTest {
 protected:
  CudaCopier() {
    one.fill(1);
    two.fill(2);
    const std::vector<SlotRange> longer{{3, 500}, {16, 1}, {700, 20}};
    first = longer;
    std::mt19937_64 random(5);
    second = random_ranges(random, two.slots(), 60, 40);
    slots = {{&one.layout, one.memory, first}, {&two.layout, two.memory, second}};
    expected.resize((total(first) + total(second)) * one.layout.slot_bytes());
    sum = host_slot_copier()->gather(slots, {expected.data(), expected.size()}, true, 9, soon());
  }

  PlainLayer one{{3, 64, DType::bfloat16, 16, BlockOrder::hnd}, 60};
  PlainLayer two{{3, 64, DType::bfloat16, 16, BlockOrder::nhd}, 30, 3};
  std::vector<SlotRange> first;
  std::vector<SlotRange> second;
  std::vector<LayerSlots> slots;
  std::vector<std::byte> expected;
  std::uint32_t sum = 0;
};

TEST_F(CudaCopier, GathersAndScattersAsTheHostDoes) {
  for (const unsigned lanes : {1U, 3U}) {
    CudaSlotCopier copier(kernels, small(std::size_t{1} << 15, lanes));
    ASSERT_GT(expected.size(), 3 * kLane);  // several pieces
    std::vector<std::byte> packed(expected.size());
    const Packed out{packed.data(), packed.size()};
    EXPECT_EQ(copier.gather(slots, out, true, 9, soon()), sum);
    EXPECT_EQ(packed, expected);
    std::fill(packed.begin(), packed.end(), std::byte{0});
    EXPECT_EQ(copier.gather(slots, out, false, 9, soon()), 9U);
    EXPECT_EQ(packed, expected);

    PlainLayer to_one(one.spec, 60, 2);
    PlainLayer to_two(two.spec, 30, 1);
    std::vector<LayerSlots> to{{&to_one.layout, to_one.memory, first},
                               {&to_two.layout, to_two.memory, second}};
    copier.scatter(to, {expected.data(), expected.size()}, soon());
    copier.finish(soon());
    EXPECT_EQ(host_slot_copier()->gather(to, out, true, 9, soon()), sum);
    EXPECT_EQ(copier.digest(slots[0], 3, soon()), host_slot_copier()->digest(slots[0], 3, soon()));
    EXPECT_EQ(copier.digest(slots[1], 0, soon()), host_slot_copier()->digest(slots[1], 0, soon()));
    EXPECT_EQ(copier.digest({&one.layout, one.memory, {}}, 5, soon()), 5U);
  }
}

TEST_F(CudaCopier, LongRunsGoByTheCopyEngine) {
  CudaSlotCopier copier(kernels, small());
  std::vector<std::byte> packed(expected.size());
  copier.gather(slots, {packed.data(), packed.size()}, false, 0, soon());
  EXPECT_GT(count("cuMemcpyAsync"), 0U);
  const std::uint64_t before = count("cuMemcpyAsync");
  CudaSlotCopier kernel_only(kernels, small(~std::size_t{0}));
  kernel_only.gather(slots, {packed.data(), packed.size()}, false, 0, soon());
  EXPECT_EQ(count("cuMemcpyAsync"), before);
  // Blocks of 36,864 bytes with others in between, as in a stack.
  PlainLayer big({3, 192, DType::float32, 8, BlockOrder::hnd}, 20, 2);
  big.fill(4);
  const SlotRange range{4, 140};
  const LayerSlots of_big{&big.layout, big.memory, {&range, 1}};
  std::vector<std::byte> wanted(range.count * big.layout.slot_bytes());
  std::vector<std::byte> found(wanted.size());
  host_slot_copier()->gather({&of_big, 1}, {wanted.data(), wanted.size()}, false, 0, soon());
  copier.gather({&of_big, 1}, {found.data(), found.size()}, false, 0, soon());
  EXPECT_EQ(found, wanted);
  EXPECT_EQ(count("cuMemcpy2DAsync"), 0U);  // a piece holds no two rows
  CudaSlotCopier::Options long_lanes = small();
  long_lanes.lane_bytes = 4 * kLane;
  CudaSlotCopier other(kernels, long_lanes);
  std::fill(found.begin(), found.end(), std::byte{0});
  other.gather({&of_big, 1}, {found.data(), found.size()}, false, 0, soon());
  EXPECT_EQ(found, wanted);
  EXPECT_GT(count("cuMemcpy2DAsync"), 0U);
}

TEST_F(CudaCopier, PackedBytesMayLieOnTheDevice) {
  CudaSlotCopier copier(kernels, small());
  const CallScope scope(*context);
  const DeviceBuffer buffer(context->driver(), expected.size() + 16);
  for (const std::uint64_t offset : {0U, 2U}) {
    auto* data = reinterpret_cast<std::byte*>(buffer.pointer() + offset);
    const Packed packed{data, expected.size(), DeviceKind::cuda};
    EXPECT_EQ(copier.gather(slots, packed, true, 9, soon()), sum);
    EXPECT_EQ(std::vector<std::byte>(data, data + expected.size()), expected);
    EXPECT_EQ(copier.crc(buffer.pointer() + offset, expected.size(), 9, soon()), sum);
    PlainLayer to_one(one.spec, 60, 2);
    PlainLayer to_two(two.spec, 30, 1);
    std::vector<LayerSlots> to{{&to_one.layout, to_one.memory, first},
                               {&to_two.layout, to_two.memory, second}};
    copier.scatter(to, {data, expected.size(), DeviceKind::cuda}, soon());
    copier.finish(soon());
    std::vector<std::byte> back(expected.size());
    EXPECT_EQ(host_slot_copier()->gather(to, {back.data(), back.size()}, true, 9, soon()), sum);
  }
  EXPECT_EQ(error_of([&] {
              host_slot_copier()->gather(slots, {nullptr, expected.size(), DeviceKind::cuda}, false,
                                         0, soon());
            }).first,
            ErrorCode::invalid_argument);
}

TEST_F(CudaCopier, PartWritesOnlyItsSlots) {
  CudaSlotCopier copier(kernels, small());
  std::mt19937_64 random(7);
  for (int trial = 0; trial < 20; ++trial) {
    const SlotRange range = random_ranges(random, one.slots(), 1, 300).front();
    const std::uint64_t skip = random() % range.count;
    const SlotRange part{range.begin + skip, 1 + random() % (range.count - skip)};
    const LayerSlots from{&one.layout, one.memory, {&range, 1}};
    std::vector<std::byte> packed(range.count * one.layout.slot_bytes());
    host_slot_copier()->gather({&from, 1}, {packed.data(), packed.size()}, false, 0, soon());
    PlainLayer found(one.spec, 60);
    PlainLayer wanted(one.spec, 60);
    const ConstPacked in{packed.data(), packed.size()};
    copier.scatter_part(found.layout, found.memory, range, in, part, soon());
    copier.finish(soon());
    host_slot_copier()->scatter_part(wanted.layout, wanted.memory, range, in, part, soon());
    ASSERT_EQ(found.bytes, wanted.bytes);
  }
}

TEST_F(CudaCopier, WrongSizesAndRangesAreRefusedBeforeAnythingIsCopied) {
  CudaSlotCopier copier(kernels, small());
  std::vector<std::byte> packed(expected.size() - 1);
  EXPECT_EQ(error_of([&] {
              copier.gather(slots, {packed.data(), packed.size()}, false, 0, soon());
            }).first,
            ErrorCode::invalid_argument);
  EXPECT_EQ(error_of([&] { copier.scatter(slots, {packed.data(), packed.size()}, soon()); }).first,
            ErrorCode::invalid_argument);
  const SlotRange outside{955, 6};
  const LayerSlots bad{&one.layout, one.memory, {&outside, 1}};
  EXPECT_EQ(error_of([&] {
              copier.gather({&bad, 1}, {packed.data(), 6 * one.layout.slot_bytes()}, false, 0,
                            soon());
            }).first,
            ErrorCode::invalid_argument);
  EXPECT_EQ(count("cuLaunchKernel"), 0U);
  CudaSlotCopier::Options options = small();
  options.lane_bytes = 1000;
  EXPECT_EQ(error_of([&] { CudaSlotCopier other(kernels, options); }).first,
            ErrorCode::invalid_argument);
}

TEST_F(CudaCopier, WaitsForTheWriterAndUntilTheWritesAreThere) {
  CudaSlotCopier copier(kernels, small());
  std::vector<std::byte> packed(expected.size());
  PlainLayer target(one.spec, 60);
  const LayerSlots to{&target.layout, target.memory, first};
  const std::size_t bytes = total(first) * one.layout.slot_bytes();
  {
    // A writer on another stream that has not finished.
    OwnStream writer(context);
    const auto events = std::make_shared<EventPool>(context);
    const CallScope scope(*context);
    const DeviceBuffer memory(context->driver(), 4 * one.layout.block_bytes);
    const LayerMemory written{reinterpret_cast<std::byte*>(memory.pointer()),
                              one.layout.block_bytes, 4};
    const SlotRange range{1, 20};
    const LayerSlots from{&one.layout, written, {&range, 1}};
    const std::size_t size = range.count * one.layout.slot_bytes();
    hold(writer.handle(), true);
    context->driver().check(context->driver().api().memset_d8_async(
                                memory.pointer(), 7, 4 * one.layout.block_bytes, writer.handle()),
                            "cuMemsetD8Async");
    const auto event = std::static_pointer_cast<CudaEvent>(events->record(writer.handle()));
    copier.wait_for(event->handle());
    const auto gather = [&](Deadline deadline) {
      copier.gather({&from, 1}, {packed.data(), size}, false, 0, deadline);
    };
    EXPECT_EQ(error_of([&] { gather(shortly()); }).first, ErrorCode::timeout);
    hold(writer.handle(), false);
    gather(soon());
    EXPECT_TRUE(std::all_of(packed.begin(), packed.begin() + static_cast<std::ptrdiff_t>(size),
                            [](std::byte b) { return b == std::byte{7}; }));
  }
  hold(copier.stream(), true);
  CudaSlotCopier::Options deep = small();
  deep.lanes = 16;
  CudaSlotCopier other(kernels, deep);
  hold(other.stream(), true);
  other.scatter({&to, 1}, {expected.data(), bytes}, soon());
  const auto [code, message] = error_of([&] { other.finish(shortly()); });
  EXPECT_EQ(code, ErrorCode::timeout);
  EXPECT_THAT(message, HasSubstr("copying slots"));
  EXPECT_EQ(target.slot(3), std::vector<std::byte>(target.layout.slot_bytes()));
  hold(other.stream(), false);
  hold(copier.stream(), false);
  other.finish(soon());
  EXPECT_EQ(target.slot(3), one.slot(3));
}

TEST_F(CudaCopier, WhateverCallFailsNothingStaysHeldAndTheNextCallWorks) {
  const int before = held();
  for (const char* symbol :
       {"cuCtxPushCurrent", "cuStreamCreateWithPriority", "cuMemAlloc", "cuMemHostAlloc"}) {
    for (std::uint64_t nth = 1; nth <= 5; ++nth) {
      SCOPED_TRACE(symbol);
      fail_nth(symbol, nth, 2);
      try {
        CudaSlotCopier copier(kernels, small());
        fail_nth(symbol, 0, 0);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::out_of_memory);
      }
      EXPECT_EQ(held(), before);
    }
  }
  CudaSlotCopier copier(kernels, small());
  std::vector<std::byte> packed(expected.size());
  const Packed out{packed.data(), packed.size()};
  for (const char* symbol : {"cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemcpyDtoHAsync",
                             "cuMemcpyAsync", "cuEventRecord", "cuEventCreate"}) {
    for (std::uint64_t nth = 1; nth <= 3; ++nth) {
      SCOPED_TRACE(symbol);
      fail_nth(symbol, nth, 719);
      try {
        copier.gather(slots, out, true, 9, soon());
        fail_nth(symbol, 0, 0);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::device);
        EXPECT_THAT(error.what(), HasSubstr(symbol));
      }
      EXPECT_EQ(copier.gather(slots, out, true, 9, soon()), sum);
      EXPECT_EQ(packed, expected);
    }
  }
}

// Both kinds of memory at both ends, over a channel that carries bytes of the host.
struct Ends {
  bool source_on_gpu;
  bool target_on_gpu;
  bool checksum;
};
class MixedSession : public test::SlotDriverTest, public ::testing::WithParamInterface<Ends> {};

INSTANTIATE_TEST_SUITE_P(Ends, MixedSession,
                         ::testing::Values(Ends{true, true, true}, Ends{true, false, true},
                                           Ends{false, true, true}, Ends{true, true, false}));

TEST_P(MixedSession, RoundsConvergeAndDigestsAgree) {
  const std::vector<std::uint32_t> ids{2, 5, 6};
  const KVSpec spec{2, 64, DType::bfloat16, 16, BlockOrder::hnd};
  KVSpec other = spec;
  other.order = BlockOrder::nhd;
  EndMemory source(spec, ids, 64, 2);
  EndMemory target(other, ids, 64);
  for (std::size_t i = 0; i < ids.size(); ++i) source.layers[i]->fill(i + 1);
  const auto copier = [&](bool on_gpu) -> std::shared_ptr<SlotCopier> {
    if (!on_gpu) return nullptr;
    return std::make_shared<CudaSlotCopier>(kernels, small());
  };
  const auto [a, b] = pipelive::test::make_channels(pipelive::test::ChannelKind::tcp);
  PatchReceiver::Options receiving;
  receiving.epoch = 3;
  PatchSender::Options sending;
  sending.epoch = 3;
  sending.checksum = GetParam().checksum;
  sending.max_message_bytes = 100'000;
  RunningReceiver running(b, target.patch_layers(copier(GetParam().target_on_gpu)), receiving);
  PatchSender sender(a, source.patch_layers(copier(GetParam().source_on_gpu)), sending);
  const std::vector<SlotRange> all{{0, source.slots()}};
  sender.send_round(0, 0, all, {}, soon());
  sender.wait_applied(0, soon());
  std::mt19937_64 random(11);
  for (int round = 1; round <= 4; ++round) {
    std::vector<SlotRange> dirty;
    for (std::uint64_t slot = random() % 8; slot < source.slots(); slot += 1 + random() % 90) {
      dirty.push_back({slot, 1});
    }
    for (const SlotRange& range : dirty) {
      for (const auto& layer : source.layers) {
        std::byte* const block = layer->memory.base + range.begin / 16 * layer->memory.block_stride;
        block[random() % 16 * layer->layout.token_stride / 16 +
              range.begin % 16 * layer->layout.token_stride] = static_cast<std::byte>(random());
      }
    }
    sender.send_round(static_cast<std::uint64_t>(round), round, dirty, {}, soon());
    sender.wait_applied(round, soon());
  }
  EXPECT_EQ(sender.verify(all, soon()), 3 * source.slots());
  target.layers[1]->bytes[100] ^= std::byte{1};
  EXPECT_EQ(error_of([&] { sender.verify(all, soon()); }).first, ErrorCode::corrupt);
  target.layers[1]->bytes[100] ^= std::byte{1};
  for (std::size_t i = 0; i < ids.size(); ++i) {
    for (std::uint64_t slot = 0; slot < source.slots(); ++slot) {
      ASSERT_EQ(source.layers[i]->slot(slot), target.layers[i]->slot(slot));
    }
  }
}

TEST_F(CudaCopier, LayersOfOneSessionShareACopier) {
  const EndMemory memory({2, 8, DType::bfloat16, 4, BlockOrder::hnd}, {0, 1}, 8);
  std::vector<PatchLayer> layers{
      {0, memory.layers[0]->layout, memory.layers[0]->memory, nullptr,
       std::make_shared<CudaSlotCopier>(kernels, small())},
      {1, memory.layers[1]->layout, memory.layers[1]->memory, nullptr, nullptr}};
  const auto [code, message] = error_of([&] { PatchLayers both(memory.spec, layers); });
  EXPECT_EQ(code, ErrorCode::invalid_argument);
  EXPECT_THAT(message, HasSubstr("layer 1 has another copier than layer 0"));
}

}  // namespace
}  // namespace pipelive::cuda
