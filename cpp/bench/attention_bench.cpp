// Append and paged attention beside the limits of the machine, measured in the same run: decode
// reads every byte of K and V once, so it is compared with reading 64 MiB, in order (limit_GBps,
// of_limit) and in random runs of one head's keys in one block (runs_GBps); append with memcpy.
// Caches that hold the whole of a small workload let it exceed the limit.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "limits.hpp"
#include "pipelive/attention/attention.hpp"
#include "pipelive/attention/thread_pool.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kLimitBytes = std::size_t{64} << 20;

/// A cache of permuted blocks with a batch of sequences of one length over it.
struct Workload {
  Workload(DType dtype, std::int64_t batch, std::int64_t context, std::int64_t group,
           std::int64_t block_size, std::int64_t query_len)
      : args(), item(static_cast<std::int64_t>(size_of(dtype))) {
    constexpr std::int64_t kKvHeads = 4;
    constexpr std::int64_t kHeadDim = 128;
    const std::int64_t width = (context + block_size - 1) / block_size;
    args.kv.dtype = dtype;
    args.kv.num_blocks = batch * width;
    args.kv.kv_heads = kKvHeads;
    args.kv.block_size = block_size;
    args.kv.head_dim = kHeadDim;
    args.kv.token_stride = kHeadDim;
    args.kv.kv_stride = block_size * kHeadDim;
    args.kv.head_stride = 2 * args.kv.kv_stride;
    args.kv.block_stride = kKvHeads * args.kv.head_stride;
    kv_bytes = batch * width * args.kv.block_stride * item;
    kv.resize(static_cast<std::size_t>(kv_bytes));
    fill(kv, dtype);
    args.kv.base = kv.data();

    const std::int64_t heads = group * kKvHeads;
    args.query = {nullptr, dtype, batch * query_len, heads, kHeadDim, heads * kHeadDim, kHeadDim};
    query.resize(static_cast<std::size_t>(batch * query_len * heads * kHeadDim * item));
    fill(query, dtype);
    out.resize(query.size());
    args.out = args.query;
    args.query.data = query.data();
    args.out.data = out.data();

    tables.resize(static_cast<std::size_t>(batch * width));
    std::iota(tables.begin(), tables.end(), 0);
    std::shuffle(tables.begin(), tables.end(), std::mt19937(1));
    lens.assign(static_cast<std::size_t>(batch), static_cast<std::int32_t>(context));
    for (std::int64_t i = 0; i <= batch; ++i) {
      starts.push_back(static_cast<std::int32_t>(i * query_len));
    }
    args.num_seqs = batch;
    args.block_tables = tables.data();
    args.table_width = args.table_stride = width;
    args.seq_lens = lens.data();
    args.query_start = starts.data();
    args.scale = 0.088;
  }

  /// Small numbers of either sign in every dtype; a pattern of 64 KiB, again and again.
  static void fill(std::vector<std::byte>& memory, DType dtype) {
    std::mt19937 random(7);
    const std::size_t pattern = std::min<std::size_t>(memory.size(), 64 << 10);
    const std::uint32_t exponent = dtype == DType::float16 ? 0x3800u : 0x3f00u;
    for (std::size_t i = 0; i + 4 <= pattern; i += 4) {
      const float value = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
      std::uint32_t bits = (exponent | (random() & 0x807fu)) * 0x10001u;
      if (dtype == DType::float32) std::memcpy(&bits, &value, 4);
      std::memcpy(&memory[i], &bits, 4);
    }
    for (std::size_t i = pattern; i < memory.size(); i += pattern) {
      std::memcpy(&memory[i], memory.data(), std::min(pattern, memory.size() - i));
    }
  }

  AttentionArgs args;
  std::int64_t item;
  std::int64_t kv_bytes = 0;
  std::vector<std::byte> kv, query, out;
  std::vector<std::int32_t> tables, lens, starts;
};

void report(benchmark::State& state, double bytes, double limit) {
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) *
                          static_cast<std::int64_t>(state.iterations()));
  state.counters["limit_GBps"] = limit / 1e9;
  state.counters["of_limit"] =
      benchmark::Counter(bytes / limit, benchmark::Counter::kIsIterationInvariantRate);
}

struct Shape {
  DType dtype;
  std::int64_t batch, context, group, block_size, query_len;
  unsigned threads;
  Isa isa;

  [[nodiscard]] std::string name(const char* kind) const {
    return std::string(kind) + "/" + std::string(to_string(isa)) + "/" +
           std::string(to_string(dtype)) + "/batch:" + std::to_string(batch) +
           "/context:" + std::to_string(context) + "/query:" + std::to_string(query_len) +
           "/G:" + std::to_string(group) + "/block:" + std::to_string(block_size) +
           "/threads:" + std::to_string(threads);
  }
};

void bench_decode(benchmark::State& state, const Shape& shape) {
  Workload work(shape.dtype, shape.batch, shape.context, shape.group, shape.block_size, 1);
  work.args.threads = shape.threads;
  work.args.isa = shape.isa;
  const auto threads = static_cast<int>(shape.threads);
  const double limit = bench::read_bandwidth(threads, kLimitBytes);
  const auto run = static_cast<std::size_t>(shape.block_size * work.args.kv.head_dim * work.item);
  state.counters["runs_GBps"] = bench::random_read_bandwidth(run, threads, kLimitBytes) / 1e9;
  for (auto _ : state) paged_attention(work.args);
  report(state, static_cast<double>(work.kv_bytes), limit);
}

void bench_prefill(benchmark::State& state, const Shape& shape) {
  Workload work(shape.dtype, shape.batch, shape.context, shape.group, shape.block_size,
                shape.query_len);
  work.args.threads = shape.threads;
  work.args.isa = shape.isa;
  for (auto _ : state) paged_attention(work.args);
  const double context = static_cast<double>(shape.context);
  const double rows = static_cast<double>(shape.query_len);
  const double pairs = rows * (context - rows) + rows * (rows + 1) / 2;
  state.counters["GFLOPps"] = benchmark::Counter(
      pairs * static_cast<double>(shape.batch * work.args.query.heads * work.args.kv.head_dim) *
          4e-9,
      benchmark::Counter::kIsIterationInvariantRate);
}

void bench_append(benchmark::State& state, const Shape& shape) {
  Workload work(shape.dtype, shape.batch, shape.context, 1, shape.block_size, shape.query_len);
  std::vector<std::byte> value = work.query;
  TokenView keys = work.args.query;
  TokenView values = keys;
  values.data = value.data();
  std::vector<std::int64_t> slots;
  for (std::int64_t seq = 0; seq < shape.batch; ++seq) {
    for (std::int64_t i = shape.context - shape.query_len; i < shape.context; ++i) {
      const auto at = static_cast<std::size_t>(seq * work.args.table_width + i / shape.block_size);
      slots.push_back(work.tables[at] * shape.block_size + i % shape.block_size);
    }
  }
  // The limit: the same bytes by memcpy into a place that is as cold or warm as the slots.
  const std::size_t bytes = work.query.size();
  double limit = 0;
  for (int round = 0; round < 50; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    std::memcpy(work.kv.data(), work.query.data(), bytes);
    std::memcpy(work.kv.data() + bytes, value.data(), bytes);
    benchmark::ClobberMemory();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    limit = std::max(limit, 2.0 * static_cast<double>(bytes) / took.count());
  }
  for (auto _ : state) append(work.args.kv, keys, values, slots, shape.isa);
  report(state, 2.0 * static_cast<double>(bytes), limit);
}

using Bench = void (*)(benchmark::State&, const Shape&);

void add(const char* kind, Bench bench, const Shape& shape) {
  benchmark::RegisterBenchmark(shape.name(kind).c_str(),
                               [=](benchmark::State& state) { bench(state, shape); })
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

const bool registered = [] {
  const unsigned all = ThreadPool::hardware_threads();
  const Isa best = best_isa();
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    for (const std::int64_t group : {1, 4, 8}) {
      add("decode", bench_decode, {dtype, 8, 4096, group, 16, 1, 1, best});
      if (all > 1) add("decode", bench_decode, {dtype, 8, 4096, group, 16, 1, all, best});
    }
  }
  for (const std::int64_t block_size : {1, 64}) {
    add("decode", bench_decode, {DType::bfloat16, 8, 4096, 4, block_size, 1, 1, best});
  }
  for (const auto& [batch, context] : {std::pair{1, 32768}, {64, 512}, {1, 128}, {16, 128}}) {
    add("decode", bench_decode, {DType::bfloat16, batch, context, 4, 16, 1, 1, best});
    if (all > 1)
      add("decode", bench_decode, {DType::bfloat16, batch, context, 4, 16, 1, all, best});
  }
  for (const Isa isa : available_isas()) {
    if (isa == best) continue;
    for (const std::int64_t group : {1, 4}) {
      add("decode", bench_decode, {DType::bfloat16, 8, 4096, group, 16, 1, 1, isa});
    }
  }
  for (const DType dtype : {DType::bfloat16, DType::float32}) {
    for (const std::int64_t group : {1, 4}) {
      add("prefill", bench_prefill, {dtype, 1, 2048, group, 16, 512, 1, best});
      if (all > 1) add("prefill", bench_prefill, {dtype, 1, 2048, group, 16, 512, all, best});
    }
  }
  for (const std::int64_t query_len : {1, 64, 1024}) {
    for (const std::int64_t block_size : {16, 64}) {
      add("append", bench_append, {DType::bfloat16, 8, 2048, 1, block_size, query_len, 1, best});
    }
  }
  return true;
}();

}  // namespace
}  // namespace pipelive
