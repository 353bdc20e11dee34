#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "pipelive/tracker/dirty_tracker.hpp"
#include "pipelive/tracker/slot_bitmap.hpp"

// One step is opened, logged and sealed per iteration; the limits beside the collects are a memset
// and a read of as many bytes as the bitmap has.
namespace pipelive {
namespace {

constexpr std::int64_t kSlots = 1 << 20;

/// One slot in each of `count` blocks of 16, as a decode step writes them.
std::vector<std::int64_t> decode_slots(std::int64_t count) {
  std::vector<std::int64_t> slots(static_cast<std::size_t>(kSlots / 16));
  std::iota(slots.begin(), slots.end(), 0);
  std::mt19937_64 random(1);
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(static_cast<std::size_t>(count));
  for (std::int64_t& slot : slots) {
    slot = slot * 16 + static_cast<std::int64_t>(random() % 16);
  }
  return slots;
}

/// `count` slots in whole blocks of 16 that lie in random order, as a prefill chunk writes them.
std::vector<std::int64_t> prefill_slots(std::int64_t count) {
  std::vector<std::int64_t> slots;
  for (const std::int64_t block : decode_slots((count + 15) / 16)) {
    for (std::int64_t i = 0; i < 16; ++i) slots.push_back(block / 16 * 16 + i);
  }
  slots.resize(static_cast<std::size_t>(count));
  return slots;
}

void record_alone(benchmark::State& state) {
  const std::vector<std::int64_t> slots = decode_slots(state.range(0));
  DirtyTracker tracker(kSlots);
  std::int64_t seq = 0;
  tracker.open(seq);
  std::int64_t records = 0;
  for (auto _ : state) {
    tracker.record(seq, slots);
    if (++records % 64 == 0) {  // a step's log stays as small as it is in life
      tracker.seal(seq);
      tracker.open(++seq);
    }
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(record_alone)->Arg(1)->Arg(4)->Arg(16)->Arg(64)->Arg(256);

void log_step(benchmark::State& state, const std::vector<std::int64_t>& slots) {
  DirtyTracker tracker(kSlots);
  std::int64_t seq = 0;
  for (auto _ : state) {
    tracker.open(seq);
    tracker.record(seq, slots);
    tracker.seal(seq);
    ++seq;
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(slots.size()));
}
void log_decode_step(benchmark::State& state) {
  log_step(state, decode_slots(state.range(0)));
}
BENCHMARK(log_decode_step)->Arg(1)->Arg(16)->Arg(256);
void log_prefill_chunk(benchmark::State& state) {
  log_step(state, prefill_slots(state.range(0)));
}
BENCHMARK(log_prefill_chunk)->Arg(512)->Arg(8192);

/// A collect of `kSlots` slots of which every `state.range(0)`th was written.
void collect(benchmark::State& state) {
  const std::int64_t every = state.range(0);
  std::vector<SlotRange> written;
  for (std::int64_t slot = 0; slot < kSlots; slot += every) {
    written.push_back({static_cast<std::uint64_t>(slot), 1});
  }
  DirtyTracker tracker(kSlots);
  std::size_t ranges = 0;
  for (auto _ : state) {
    state.PauseTiming();
    tracker.restore(written);
    state.ResumeTiming();
    Collected collected = tracker.collect();
    benchmark::DoNotOptimize(collected.ranges.data());
    ranges = collected.ranges.size();
  }
  state.counters["slots"] = static_cast<double>(written.size());
  state.counters["ranges"] = static_cast<double>(ranges);
}
BENCHMARK(collect)->Arg(1)->Arg(2)->Arg(16)->Arg(256)->Arg(4096)->Arg(kSlots)->Unit(
    benchmark::kMicrosecond);

void limit_memset_bitmap(benchmark::State& state) {
  std::vector<std::uint64_t> words(kSlots / 64, 1);
  for (auto _ : state) {
    std::memset(words.data(), 0, words.size() * sizeof(words[0]));
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kSlots / 8);
}
BENCHMARK(limit_memset_bitmap)->Unit(benchmark::kMicrosecond);

void limit_read_bitmap(benchmark::State& state) {
  const std::vector<std::uint64_t> words(kSlots / 64, 1);
  for (auto _ : state) {
    std::uint64_t all = 0;
    for (const std::uint64_t word : words) all |= word;
    benchmark::DoNotOptimize(all);
  }
  state.SetBytesProcessed(state.iterations() * kSlots / 8);
}
BENCHMARK(limit_read_bitmap)->Unit(benchmark::kMicrosecond);

/// Writing as many ranges as the collect of every second slot gives.
void limit_write_ranges(benchmark::State& state) {
  for (auto _ : state) {
    std::vector<SlotRange> ranges;
    ranges.reserve(kSlots / 2);
    for (std::uint64_t slot = 0; slot < kSlots; slot += 2) ranges.push_back({slot, 1});
    benchmark::DoNotOptimize(ranges.data());
  }
  state.SetBytesProcessed(state.iterations() * kSlots / 2 *
                          static_cast<std::int64_t>(sizeof(SlotRange)));
}
BENCHMARK(limit_write_ranges)->Unit(benchmark::kMicrosecond);

/// A decode step of 64 rows while another thread collects all the time.
void log_while_collecting(benchmark::State& state) {
  static DirtyTracker* tracker = nullptr;
  if (state.thread_index() == 0) tracker = new DirtyTracker(kSlots);
  const std::vector<std::int64_t> slots = decode_slots(64);
  std::int64_t seq = 0;
  for (auto _ : state) {
    if (state.thread_index() == 0) {
      tracker->open(seq);
      tracker->record(seq, slots);
      tracker->seal(seq);
      ++seq;
    } else {
      benchmark::DoNotOptimize(tracker->collect());
    }
  }
  if (state.thread_index() == 0) delete tracker;
}
BENCHMARK(log_while_collecting)->Threads(2)->UseRealTime();

}  // namespace
}  // namespace pipelive
