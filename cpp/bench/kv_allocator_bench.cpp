#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "pipelive/kv/block_allocator.hpp"

namespace pipelive {
namespace {

constexpr std::int64_t kBlocks = 1 << 16;

/// An allocator of which about half the ids, scattered, are taken.
void fragment(BlockAllocator& blocks) {
  std::vector<std::int64_t> ids = blocks.allocate(kBlocks - 1);
  std::mt19937_64 random(1);
  std::shuffle(ids.begin(), ids.end(), random);
  ids.resize(ids.size() / 2);
  blocks.release(ids);
}

void allocate_and_release(benchmark::State& state) {
  BlockAllocator blocks(kBlocks, kBlocks);
  fragment(blocks);
  for (auto _ : state) {
    const std::vector<std::int64_t> ids = blocks.allocate(state.range(0));
    blocks.release(ids);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(allocate_and_release)->Arg(1)->Arg(16)->Arg(512)->Arg(16384);

/// What a request does that ends in a busy engine: its ids wait for the step in flight.
void release_through_quarantine(benchmark::State& state) {
  BlockAllocator blocks(kBlocks, kBlocks);
  fragment(blocks);
  std::int64_t seq = 0;
  for (auto _ : state) {
    const std::vector<std::int64_t> ids = blocks.allocate(state.range(0));
    blocks.release(ids, seq + 2);
    blocks.retire(seq++);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(release_through_quarantine)->Arg(1)->Arg(16)->Arg(512);

void share_and_copy_on_write(benchmark::State& state) {
  BlockAllocator blocks(kBlocks, kBlocks);
  fragment(blocks);
  const std::vector<std::int64_t> ids = blocks.allocate(1);
  for (auto _ : state) {
    blocks.share(ids);
    const BlockAllocator::Writable writable = blocks.writable(ids[0]);
    blocks.release({&writable.id, 1});
  }
}
BENCHMARK(share_and_copy_on_write);

/// The plan and the book-keeping of a shrink that moves about a quarter of the ids.
void shrink_to_half(benchmark::State& state) {
  BlockAllocator blocks(kBlocks, kBlocks);
  fragment(blocks);
  for (auto _ : state) {
    const std::vector<IdMove> moves = blocks.plan_shrink(kBlocks / 2 + 2);
    benchmark::DoNotOptimize(moves.data());
    blocks.cancel_shrink();
  }
}
BENCHMARK(shrink_to_half)->Unit(benchmark::kMicrosecond);

void list_live(benchmark::State& state) {
  BlockAllocator blocks(kBlocks, kBlocks);
  fragment(blocks);
  for (auto _ : state) benchmark::DoNotOptimize(blocks.live().data());
}
BENCHMARK(list_live)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace pipelive
