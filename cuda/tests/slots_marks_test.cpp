// Append and the marks that it makes, under a tracker.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <deque>
#include <random>
#include <vector>

#include "pipelive/attention/attention.hpp"
#include "pipelive/cuda/append.hpp"
#include "pipelive/cuda/device_marks.hpp"
#include "pipelive/cuda/event_pool.hpp"
#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/stream.hpp"
#include "pipelive/tracker/dirty_tracker.hpp"
#include "slots_fixture.hpp"

namespace pipelive::cuda {
namespace {

using test::soon;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class Append : public test::SlotDriverTest {
 protected:
  static constexpr std::int64_t kBlocks = 40;
  static constexpr std::int64_t kHeads = 3;
  static constexpr std::int64_t kBlockSize = 8;

  // A cache of its own, in either order of heads and tokens.
  struct Cache {
    Cache(DType dtype, std::int64_t dim, bool heads_first)
        : bytes(static_cast<std::size_t>((kBlocks + 1) * kHeads * 2 * kBlockSize * dim * 4) + 64) {
      view.base = bytes.data() + (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64;
      view.dtype = dtype;
      view.num_blocks = kBlocks;
      view.kv_heads = kHeads;
      view.block_size = kBlockSize;
      view.head_dim = dim;
      view.block_stride = kHeads * 2 * kBlockSize * dim;
      view.head_stride = heads_first ? 2 * kBlockSize * dim : dim;
      view.kv_stride = heads_first ? kBlockSize * dim : kBlockSize * kHeads * dim;
      view.token_stride = heads_first ? dim : kHeads * dim;
    }
    std::vector<std::byte> bytes;
    KVView view;
  };

  // Keys or values of some tokens, with room between rows that is not a multiple of anything.
  struct Tokens {
    Tokens(std::mt19937& random, DType dtype, std::int64_t tokens, std::int64_t dim,
           std::int64_t shift)
        : bytes(static_cast<std::size_t>((tokens * (kHeads * dim + 8) + 64) * 4)) {
      view.data = bytes.data() + (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64 +
                  static_cast<std::size_t>(shift) * size_of(dtype);
      view.dtype = dtype;
      view.tokens = tokens;
      view.heads = kHeads;
      view.head_dim = dim;
      view.head_stride = dim;
      view.token_stride = kHeads * dim + (shift != 0 ? 1 : 8);
      for (std::byte& b : bytes) b = static_cast<std::byte>(random());
      if (dtype != DType::float32) return;
      auto* floats = reinterpret_cast<float*>(bytes.data());
      for (std::size_t i = 0; i < bytes.size() / 4; ++i) {
        floats[i] = static_cast<float>(static_cast<std::int32_t>(random())) * 1e-6F;
      }
    }
    std::vector<std::byte> bytes;
    TokenView view;
  };

  static DevicePointer pointer(const std::vector<std::int64_t>& slots) {
    return reinterpret_cast<DevicePointer>(slots.data());
  }
};

TEST_F(Append, WritesWhatTheHostWrites) {
  std::mt19937 random(1);
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    for (const DType source : {dtype, DType::float32}) {
      for (const std::int64_t dim : {8, 64, 80}) {
        for (const bool heads_first : {true, false}) {
          for (const std::int64_t shift : {0, 1}) {
            SCOPED_TRACE(std::to_string(static_cast<int>(dtype)) + std::to_string(dim));
            Cache found(dtype, dim, heads_first);
            Cache wanted(dtype, dim, heads_first);
            // Powers of two and others: some divide by shifting.
            const std::int64_t heads = dim == 64 ? 2 : kHeads;
            const std::int64_t block_size = shift != 0 ? kBlockSize - 1 : kBlockSize;
            found.view.kv_heads = wanted.view.kv_heads = heads;
            found.view.block_size = wanted.view.block_size = block_size;
            std::vector<std::int64_t> slots;
            for (std::int64_t slot = 0; slot < kBlocks * block_size; ++slot) {
              if (random() % 4 == 0) slots.push_back(random() % 6 == 0 ? -1 : slot);
            }
            std::shuffle(slots.begin(), slots.end(), random);
            const auto tokens = static_cast<std::int64_t>(slots.size());
            Tokens key(random, source, tokens, dim, shift);
            Tokens value(random, source, tokens, dim, 0);
            key.view.heads = value.view.heads = heads;
            pipelive::append(wanted.view, key.view, value.view, slots);
            append(*kernels, found.view, key.view, value.view, pointer(slots), tokens, nullptr);
            for (std::int64_t i = 0;
                 i < kBlocks * found.view.block_stride * static_cast<std::int64_t>(size_of(dtype));
                 ++i) {
              ASSERT_EQ(found.view.base[i], wanted.view.base[i]) << i;
            }
          }
        }
      }
    }
  }
}

TEST_F(Append, SkipsAndCountsSlotsThatAreNotThere) {
  std::mt19937 random(2);
  DeviceMarks marks(kernels, kBlocks * kBlockSize);
  DirtyTracker unused(kBlocks * kBlockSize);
  Cache cache(DType::bfloat16, 64, true);
  const std::vector<std::byte> before = cache.bytes;
  const std::vector<std::int64_t> slots{-1, kBlocks * kBlockSize, -2, std::int64_t{1} << 40};
  const Tokens key(random, DType::bfloat16, 4, 64, 0);
  append(*kernels, cache.view, key.view, key.view, pointer(slots), 4, nullptr, &marks);
  EXPECT_EQ(cache.bytes, before);
  EXPECT_EQ(marks.skipped_slots(), 3U);
  std::vector<SlotRange> ranges;
  const std::vector<unsigned> sets{0, 1, 2};
  marks.take(sets, ranges);
  EXPECT_THAT(ranges, IsEmpty());
}

TEST_F(Append, WrongArgumentsAreNamed) {
  std::mt19937 random(3);
  Cache cache(DType::bfloat16, 64, true);
  const Tokens key(random, DType::bfloat16, 2, 64, 0);
  const std::vector<std::int64_t> slots{1, 2};
  const auto refused = [&](const TokenView& k, const TokenView& v, DevicePointer s, std::int64_t n,
                           const DeviceMarks* marks = nullptr) {
    const auto [code, message] =
        error_of([&] { append(*kernels, cache.view, k, v, s, n, nullptr, marks); });
    EXPECT_EQ(code, ErrorCode::invalid_argument);
    return message;
  };
  TokenView bad = key.view;
  bad.heads = 2;
  EXPECT_THAT(refused(key.view, bad, pointer(slots), 2), HasSubstr("value: number of heads is 2"));
  bad = key.view;
  bad.head_dim = 32;
  EXPECT_THAT(refused(bad, key.view, pointer(slots), 2), HasSubstr("key: head_dim is 32"));
  bad = key.view;
  bad.dtype = DType::float16;
  EXPECT_THAT(refused(bad, key.view, pointer(slots), 2), HasSubstr("key: dtype is float16"));
  bad = key.view;
  bad.data = cache.view.base;
  EXPECT_THAT(refused(bad, key.view, pointer(slots), 2), HasSubstr("overlaps kv"));
  EXPECT_THAT(refused(key.view, key.view, pointer(slots), 1), HasSubstr("number of tokens is 2"));
  EXPECT_THAT(refused(key.view, key.view, 0, 2), HasSubstr("null pointer"));
  const DeviceMarks few(kernels, 10);
  EXPECT_THAT(refused(key.view, key.view, pointer(slots), 2, &few), HasSubstr("marks"));
  EXPECT_EQ(count("cuLaunchKernel"), 0U);
}

TEST_F(Append, MarksAreTakenAtHighPriority) {
  const auto urgent = [&] { return call<FakeDriverStreams>("fake_driver_streams")(-5); };
  const int before = urgent();
  const DeviceMarks marks(kernels, 10);
  EXPECT_EQ(urgent(), before + 1);
  const OwnStream normal(context);
  EXPECT_EQ(urgent(), before + 1);
}

class Marked : public Append {
 protected:
  static constexpr std::uint64_t kSlots = 100'000;
  std::shared_ptr<DeviceMarks> marks = std::make_shared<DeviceMarks>(kernels, kSlots, 4);
  DirtyTracker tracker{kSlots, 0, marks};
  OwnStream stream{context};

  ~Marked() override { marks.reset(); }

  // What an append of one step and one layer does, in `stream`, as far as marks go.
  void write(const std::vector<std::int64_t>& slots) {
    KVView view;
    view.dtype = DType::bfloat16;
    view.num_blocks = static_cast<std::int64_t>(kSlots);
    view.kv_heads = 1;
    view.block_size = 1;
    view.head_dim = 8;
    view.kv_stride = 8;
    view.block_stride = 16;
    view.head_stride = 16;
    view.token_stride = 16;
    storage.resize(kSlots * 32 + 64);
    view.base = storage.data() + (64 - reinterpret_cast<std::uintptr_t>(storage.data()) % 64) % 64;
    TokenView tokens;
    rows.resize(64);
    tokens.data = rows.data() + (16 - reinterpret_cast<std::uintptr_t>(rows.data()) % 16) % 16;
    tokens.dtype = DType::bfloat16;
    tokens.tokens = static_cast<std::int64_t>(slots.size());
    tokens.heads = 1;
    tokens.head_dim = 8;
    kept.push_back(slots);
    append(*kernels, view, tokens, tokens, pointer(kept.back()), tokens.tokens, stream.handle(),
           marks.get());
  }

  std::shared_ptr<Event> event() { return marks->record(stream.stream()); }

  std::vector<std::byte> storage;
  std::vector<std::byte> rows;
  std::deque<std::vector<std::int64_t>> kept;  // as memory of the device would
};

TEST_F(Marked, StepsAreCollectedOnceTheDeviceHasDoneThem) {
  hold(stream.handle(), true);
  tracker.open(0);
  tracker.mark(0, stream.stream());
  write({5, 6, 99'999});
  tracker.seal(0, event());
  tracker.open(1);
  tracker.mark(1, stream.stream());
  write({7});
  EXPECT_EQ(tracker.sealed_through(), -1);
  EXPECT_THAT(tracker.collect().ranges, IsEmpty());
  hold(stream.handle(), false);  // step 1 has written by now too, but is not sealed
  const Collected first = tracker.collect();
  EXPECT_THAT(first.ranges, ElementsAre(SlotRange{5, 2}, SlotRange{99'999, 1}));
  EXPECT_EQ(first.through_seq, 0);
  tracker.seal(1, event());
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{7, 1}));
  EXPECT_EQ(marks->skipped_slots(), 0U);
}

TEST_F(Marked, MoreRangesThanFitAreReadFromTheMarks) {
  std::vector<std::int64_t> odd;
  for (std::int64_t slot = 1; slot < static_cast<std::int64_t>(kSlots); slot += 2) {
    odd.push_back(slot);
  }
  tracker.open(0);
  tracker.mark(0, stream.stream());
  write(odd);
  tracker.seal(0, event());
  const Collected collected = tracker.collect();
  ASSERT_EQ(collected.ranges.size(), odd.size());
  for (std::size_t i = 0; i < odd.size(); ++i) {
    ASSERT_EQ(collected.ranges[i], (SlotRange{static_cast<std::uint64_t>(odd[i]), 1}));
  }
  // More than come with their number, but not too many.
  std::vector<std::int64_t> some(odd.begin(), odd.begin() + 3000);
  tracker.open(1);
  tracker.mark(1, stream.stream());
  write(some);
  tracker.seal(1, event());
  EXPECT_EQ(tracker.collect().ranges.size(), some.size());
}

TEST_F(Marked, ATakeThatFailsLosesNothing) {
  for (const char* symbol : {"cuLaunchKernel", "cuMemcpyDtoHAsync", "cuEventRecord"}) {
    for (std::uint64_t nth = 1; nth <= 2; ++nth) {
      SCOPED_TRACE(symbol);
      const std::int64_t seq = tracker.next_seq();
      tracker.open(seq);
      tracker.mark(seq, stream.stream());
      write({11, 500});
      tracker.seal(seq);
      fail_nth(symbol, nth, 719);
      try {
        const Collected collected = tracker.collect();
        fail_nth(symbol, 0, 0);
        EXPECT_EQ(collected.num_slots, 2U);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::device);
        EXPECT_EQ(tracker.collect().num_slots, 2U);
      }
      EXPECT_EQ(tracker.collect().num_slots, 0U);
    }
  }
}

TEST_F(Marked, AStepIsNotBegunInsideAGraph) {
  tracker.open(0);
  call<FakeDriverCapture>("fake_driver_capture")(stream.handle(), 1);
  EXPECT_EQ(error_of([&] { tracker.mark(0, stream.stream()); }).first, ErrorCode::busy);
  call<FakeDriverCapture>("fake_driver_capture")(stream.handle(), 0);
  // What the driver says of the default stream while another stream is captured.
  fail_nth("cuStreamIsCapturing", 1, kStreamCaptureImplicit);
  EXPECT_EQ(error_of([&] { tracker.mark(0, stream.stream()); }).first, ErrorCode::busy);
  tracker.mark(0, stream.stream());
}

// An event in a captured stream is a place in the graph, and can never be asked.
TEST_F(Marked, AStepIsNotSealedInsideAGraph) {
  tracker.open(0);
  tracker.mark(0, stream.stream());
  write({3});
  call<FakeDriverCapture>("fake_driver_capture")(stream.handle(), 1);
  EXPECT_EQ(error_of([&] { tracker.seal(0, event()); }).first, ErrorCode::busy);
  EXPECT_EQ(tracker.sealed_through(), -1);
  call<FakeDriverCapture>("fake_driver_capture")(stream.handle(), 0);
  tracker.seal(0, event());
  EXPECT_EQ(tracker.sealed_through(), 0);
  EXPECT_THAT(tracker.collect().ranges, ElementsAre(SlotRange{3, 1}));
}

TEST_F(Marked, AgreeWithTheHostsLog) {
  std::mt19937 random(4);
  DirtyTracker host(kSlots);
  std::vector<std::int64_t> open;
  std::int64_t next = 0;
  for (int i = 0; i < 400; ++i) {
    const unsigned kind = random() % 8;
    if (kind < 4 && (open.empty() || next - open.front() < 4)) {
      std::vector<std::int64_t> slots(random() % 40);
      for (std::int64_t& slot : slots) {
        slot = static_cast<std::int64_t>(random() % (random() % 2 == 0 ? 300 : kSlots));
      }
      tracker.open(next);
      tracker.mark(next, stream.stream());
      host.open(next);
      host.record(next, slots);
      if (!slots.empty()) write(slots);
      open.push_back(next++);
    } else if (kind < 7 && !open.empty()) {
      const std::size_t chosen = random() % open.size();
      host.seal(open[chosen]);
      if (random() % 2 == 0) {
        tracker.seal(open[chosen], event());
      } else {
        tracker.seal(open[chosen]);
      }
      open.erase(open.begin() + static_cast<std::ptrdiff_t>(chosen));
    } else {
      ASSERT_EQ(tracker.pending_slots(), host.pending_slots());
      const Collected a = tracker.collect();
      const Collected b = host.collect();
      ASSERT_EQ(a.ranges, b.ranges);
      ASSERT_EQ(a.through_seq, b.through_seq);
      ASSERT_EQ(a.num_slots, b.num_slots);
    }
  }
}

}  // namespace
}  // namespace pipelive::cuda
