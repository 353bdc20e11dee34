// What pages cost: created, mapped and unmapped in runs, passed on between users. Pages of 2 MiB of
// host memory. GBps is physical memory per second; us_per_page is beside it because the cost goes
// with the number of calls and of page-table entries, not with the bytes. of_limit compares with
// the same work by bare system calls in the same run, each over the whole range at once.

#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "limits.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/device/host_device.hpp"
#include "pipelive/memory/arena.hpp"
#include "pipelive/memory/page_pool.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kPage = std::size_t{2} << 20;
constexpr std::size_t kPages = 128;

constexpr std::size_t kBytes = kPages * kPage;

// Seconds per page of bare system calls, the best of several rounds.
struct BareCalls {
  double create = 1e30;  // fallocate, then punching the hole
  double map = 1e30;     // mmap over a reservation, filling the page table, then covering it again
};

BareCalls measure_bare_calls() {
  const UniqueFd file(memfd_create("bench", MFD_CLOEXEC));
  void* const place =
      mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!file.valid() || place == MAP_FAILED || ftruncate(file.get(), kBytes) != 0) {
    throw Error(ErrorCode::device, "no memory file for the limits");
  }
  const auto seconds = [](auto&& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  bool fine = true;
  const auto create = [&] { fine = fine && fallocate(file.get(), 0, 0, kBytes) == 0; };
  const auto punch = [&] {
    constexpr int kHow = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    fine = fine && fallocate(file.get(), kHow, 0, kBytes) == 0;
  };
  const auto map = [&] {
    fine = fine && mmap(place, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file.get(),
                        0) != MAP_FAILED;
#ifdef MADV_POPULATE_READ
    static_cast<void>(madvise(place, kBytes, MADV_POPULATE_READ));
#endif
    fine =
        fine && mmap(place, kBytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
  };
  BareCalls best;
  for (int round = 0; round < bench::kLimitRounds; ++round) {
    best.create = std::min(best.create, (seconds(create) + seconds(punch)) / kPages);
  }
  create();
  map();  // the kernel zeroes pages when they are first mapped
  for (int round = 0; round < bench::kLimitRounds; ++round) {
    best.map = std::min(best.map, seconds(map) / kPages);
  }
  munmap(place, kBytes);
  if (!fine) throw Error(ErrorCode::device, "a bare system call failed");
  return best;
}

const BareCalls& bare_calls() {
  static const BareCalls calls = measure_bare_calls();
  return calls;
}

void report(benchmark::State& state, std::size_t pages_per_round, double limit_seconds_per_page) {
  const auto pages = static_cast<double>(state.iterations()) * static_cast<double>(pages_per_round);
  state.counters["us_per_page"] =
      benchmark::Counter(pages * 1e-6, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.counters["GBps"] =
      benchmark::Counter(pages * static_cast<double>(kPage) * 1e-9, benchmark::Counter::kIsRate);
  state.counters["of_limit"] =
      benchmark::Counter(pages * limit_seconds_per_page, benchmark::Counter::kIsRate);
}

void create_and_destroy(benchmark::State& state) {
  const double limit = bare_calls().create;
  HostDevice device;
  for (auto _ : state) {
    const auto pages = device.create_pages(kPage, kPages);
    device.destroy_pages(kPage, pages);
  }
  report(state, kPages, limit);
}
BENCHMARK(create_and_destroy)->Unit(benchmark::kMillisecond);

/// Maps pages that the pool keeps, in runs of range(0) pages, and unmaps them again.
void map_and_unmap(benchmark::State& state) {
  const double limit = bare_calls().map;
  const auto run = static_cast<std::size_t>(state.range(0)) * kPage;
  const auto pool = PagePool::create(std::make_shared<HostDevice>(), {kPage, kPages * kPage, 0});
  pool->take(kPages).give_back();
  Arena arena(pool, kPages * kPage);
  for (auto _ : state) {
    for (std::size_t at = 0; at < kPages * kPage; at += run) arena.map(at, run);
    for (std::size_t at = 0; at < kPages * kPage; at += run) arena.unmap(at, run);
  }
  report(state, kPages, limit);
}
BENCHMARK(map_and_unmap)->Arg(1)->Arg(16)->Arg(128)->Unit(benchmark::kMillisecond);

/// Pages that one user leaves full appear as zeros for the next: two mappings and a memset.
void pass_on_scrubbed(benchmark::State& state) {
  std::vector<std::byte> memory(kBytes, std::byte{1});
  const double fill = bench::detail::best_seconds(
      1, bench::kLimitRounds, [&](int) { std::memset(memory.data(), 0, kBytes); });
  const double limit = 2 * bare_calls().map + fill / kPages;
  const auto pool = PagePool::create(std::make_shared<HostDevice>(), {kPage, kPages * kPage, 0});
  Arena weights(pool, kPages * kPage);
  Arena kv(pool, kPages * kPage, {true, nullptr});
  for (auto _ : state) {
    weights.map(0, kPages * kPage);
    weights.unmap(0, kPages * kPage);
    kv.map(0, kPages * kPage);
    kv.unmap(0, kPages * kPage);
  }
  report(state, kPages, limit);
}
BENCHMARK(pass_on_scrubbed)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace pipelive
