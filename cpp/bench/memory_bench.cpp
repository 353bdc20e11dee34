// What pages cost: created, mapped and unmapped in runs, passed on between users. Pages of 2 MiB of
// host memory. GBps is physical memory per second; us_per_page is beside it because the cost goes
// with the number of calls and of page-table entries, not with the bytes.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "pipelive/device/host_device.hpp"
#include "pipelive/memory/arena.hpp"
#include "pipelive/memory/page_pool.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kPage = std::size_t{2} << 20;
constexpr std::size_t kPages = 128;

void report(benchmark::State& state, std::size_t pages_per_round) {
  const auto pages = static_cast<double>(state.iterations()) * static_cast<double>(pages_per_round);
  state.counters["us_per_page"] =
      benchmark::Counter(pages * 1e-6, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.counters["GBps"] =
      benchmark::Counter(pages * static_cast<double>(kPage) * 1e-9, benchmark::Counter::kIsRate);
}

void create_and_destroy(benchmark::State& state) {
  HostDevice device;
  for (auto _ : state) {
    const auto pages = device.create_pages(kPage, kPages);
    device.destroy_pages(kPage, pages);
  }
  report(state, kPages);
}
BENCHMARK(create_and_destroy)->Unit(benchmark::kMillisecond);

/// Maps pages that the pool keeps, in runs of range(0) pages, and unmaps them again.
void map_and_unmap(benchmark::State& state) {
  const auto run = static_cast<std::size_t>(state.range(0)) * kPage;
  const auto pool = PagePool::create(std::make_shared<HostDevice>(), {kPage, kPages * kPage, 0});
  pool->take(kPages).give_back();
  Arena arena(pool, kPages * kPage);
  for (auto _ : state) {
    for (std::size_t at = 0; at < kPages * kPage; at += run) arena.map(at, run);
    for (std::size_t at = 0; at < kPages * kPage; at += run) arena.unmap(at, run);
  }
  report(state, kPages);
}
BENCHMARK(map_and_unmap)->Arg(1)->Arg(16)->Arg(128)->Unit(benchmark::kMillisecond);

/// Pages that one user leaves full appear as zeros for the next.
void pass_on_scrubbed(benchmark::State& state) {
  const auto pool = PagePool::create(std::make_shared<HostDevice>(), {kPage, kPages * kPage, 0});
  Arena weights(pool, kPages * kPage);
  Arena kv(pool, kPages * kPage, {true, nullptr});
  for (auto _ : state) {
    weights.map(0, kPages * kPage);
    weights.unmap(0, kPages * kPage);
    kv.map(0, kPages * kPage);
    kv.unmap(0, kPages * kPage);
  }
  report(state, kPages);
}
BENCHMARK(pass_on_scrubbed)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace pipelive
