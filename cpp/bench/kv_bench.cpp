// Resizing a stage's KV memory in place, and what the checks on the way to it cost.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "limits.hpp"
#include "pipelive/device/host_device.hpp"
#include "pipelive/kv/kv_pool.hpp"

namespace pipelive {
namespace {

/// 16 layers of 64 KiB blocks; 2048 blocks are 2 GiB.
std::shared_ptr<KVPool> make_pool(std::uint32_t stack, std::uint64_t capacity) {
  const KVSpec spec{8, 128, DType::bfloat16, 16, BlockOrder::hnd};
  const auto pages = PagePool::create(std::make_shared<HostDevice>(),
                                      {std::size_t{2} << 20, std::uint64_t{1} << 30, 0});
  KVPoolOptions options;
  options.num_layers = 16;
  options.layers.resize(16);
  std::iota(options.layers.begin(), options.layers.end(), 0u);
  options.max_blocks = 2048;
  options.capacity = capacity;
  options.stack = stack;
  return KVPool::create(spec, pages, options);
}

/// From 256 to 512 blocks and back, with stacks of range(0) layers: 256 MiB each way.
void grow_and_shrink(benchmark::State& state) {
  const auto pool = make_pool(static_cast<std::uint32_t>(state.range(0)), 256);
  for (auto _ : state) {
    pool->grow(512);
    pool->shrink(256, {}, {});
  }
  state.counters["MiB"] = 256;
}
BENCHMARK(grow_and_shrink)->Arg(1)->Arg(4)->Arg(16)->Unit(benchmark::kMillisecond);

/// 32 MiB in blocks of 64 KiB, beside memcpy of large arrays.
void move_blocks(benchmark::State& state) {
  const double limit = bench::copy_bandwidth();
  const auto pool = make_pool(4, 256);
  std::vector<BlockMove> moves;
  for (std::uint64_t block = 0; block < 32; ++block) moves.push_back({255 - block, 1 + 2 * block});
  for (auto _ : state) pool->move_blocks(moves);
  const double bytes = static_cast<double>(moves.size() * 16 * pool->spec().block_bytes());
  const auto rounds = static_cast<double>(state.iterations());
  state.SetBytesProcessed(static_cast<std::int64_t>(rounds * bytes));
  state.counters["of_limit"] =
      benchmark::Counter(rounds * bytes / limit, benchmark::Counter::kIsRate);
}
BENCHMARK(move_blocks)->Unit(benchmark::kMillisecond);

void check_resident(benchmark::State& state) {
  const auto pool = make_pool(1, 256);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(state.range(0)));
  std::iota(ids.begin(), ids.end(), 0);
  for (auto _ : state) {
    const Residency::Use use = pool->residency().use();
    pool->check_resident<std::int32_t>(3, ids);
  }
}
BENCHMARK(check_resident)->Arg(1)->Arg(256);

}  // namespace
}  // namespace pipelive
