// The machine's limits themselves, so that every report carries them beside the layers' figures.
#include <benchmark/benchmark.h>

#include <cstddef>

#include "limits.hpp"

namespace {

using namespace pipelive::bench;

// The measuring functions time themselves; the loop around them runs once.
template <typename Measure>
void report(benchmark::State& state, Measure&& measure) {
  double rate = 0;
  for (auto _ : state) rate = measure();
  state.counters["bytes_per_second"] =
      benchmark::Counter(rate, benchmark::Counter::kDefaults, benchmark::Counter::kIs1024);
}

void limit_copy(benchmark::State& state) {
  report(state, [&] { return copy_bandwidth(static_cast<int>(state.range(0))); });
}
BENCHMARK(limit_copy)->ArgName("threads")->Arg(1)->Arg(2)->Iterations(1);

void limit_read(benchmark::State& state) {
  report(state, [&] { return read_bandwidth(static_cast<int>(state.range(0))); });
}
BENCHMARK(limit_read)->ArgName("threads")->Arg(1)->Arg(2)->Iterations(1);

void limit_random_read(benchmark::State& state) {
  report(state, [&] {
    return random_read_bandwidth(static_cast<std::size_t>(state.range(0)),
                                 static_cast<int>(state.range(1)));
  });
}
BENCHMARK(limit_random_read)
    ->ArgNames({"run_bytes", "threads"})
    ->ArgsProduct({{128, 4096, 16384, 65536}, {1, 2}})
    ->Iterations(1);

void limit_random_gather(benchmark::State& state) {
  report(state, [&] {
    return random_gather_bandwidth(static_cast<std::size_t>(state.range(0)),
                                   static_cast<int>(state.range(1)));
  });
}
BENCHMARK(limit_random_gather)
    ->ArgNames({"run_bytes", "threads"})
    ->ArgsProduct({{128, 4096, 16384, 65536}, {1, 2}})
    ->Iterations(1);

}  // namespace
