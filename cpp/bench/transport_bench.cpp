// Packing, checksums and channels, each beside what the machine does at best: memcpy, and for
// scattered slots a random gather of runs of the same length.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "limits.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/shm_channel.hpp"
#include "pipelive/transport/slot_copy.hpp"
#include "pipelive/transport/tcp_channel.hpp"

namespace pipelive {
namespace {

constexpr std::size_t kPackedBytes = std::size_t{4} << 20;  // one message
constexpr std::size_t kPoolBytes = std::size_t{256} << 20;

// Memory that was touched, in the pages that the system gives out.
std::vector<std::byte>& pool_memory() {
  static std::vector<std::byte> memory(kPoolBytes, std::byte{1});
  return memory;
}

// heads * 2 fragments of dim bf16 numbers: a run of dim * 2 bytes per fragment.
KVSpec spec_of(std::int64_t heads, std::int64_t dim, BlockOrder order) {
  return {static_cast<std::uint32_t>(heads), static_cast<std::uint32_t>(dim), DType::bfloat16, 16,
          order};
}

struct Workload {
  BlockLayout layout;
  LayerMemory memory;
  std::vector<SlotRange> ranges;
  std::vector<std::byte> packed;
};

// `run` slots at a time, sorted, as a collect gives them.
Workload workload(const KVSpec& spec, std::uint64_t run) {
  Workload work;
  work.layout = spec.layout();
  std::vector<std::byte>& pool = pool_memory();
  work.memory = {pool.data(), work.layout.block_bytes, pool.size() / work.layout.block_bytes};
  const std::uint64_t slots = kPackedBytes / work.layout.slot_bytes();
  const std::uint64_t places = work.memory.num_blocks * spec.block_size / run;
  std::mt19937_64 random(1);
  std::vector<std::uint64_t> chosen(places);
  for (std::uint64_t i = 0; i < places; ++i) chosen[i] = i;
  std::shuffle(chosen.begin(), chosen.end(), random);
  chosen.resize(std::max<std::uint64_t>(1, slots / run));
  std::sort(chosen.begin(), chosen.end());
  for (const std::uint64_t place : chosen) work.ranges.push_back({place * run, run});
  work.packed.assign(chosen.size() * run * work.layout.slot_bytes(), std::byte{2});
  return work;
}

void finish(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) *
                          static_cast<std::int64_t>(bytes));
}

// Measured once, in this run, single-threaded.
double copy_limit() {
  static const double rate = bench::copy_bandwidth();
  return rate;
}
double gather_limit(std::size_t run_bytes) {
  static std::map<std::size_t, double> rates;
  double& rate = rates[run_bytes];
  if (rate == 0) rate = bench::random_gather_bandwidth(run_bytes);
  return rate;
}

// Reports the rate as a share of what the machine's memory lets a plain copy do: of memcpy for long
// runs, of a random gather of runs of the same length for short ones.
void finish(benchmark::State& state, std::size_t bytes, double limit) {
  finish(state, bytes);
  state.counters["of_limit"] = benchmark::Counter(static_cast<double>(bytes) / limit,
                                                  benchmark::Counter::kIsIterationInvariantRate);
}

void BM_Limits(benchmark::State& state) {
  const auto run = static_cast<std::size_t>(state.range(0));
  for (auto _ : state) benchmark::DoNotOptimize(run);
  state.counters["bytes_per_second"] = run == 0 ? copy_limit() : gather_limit(run);
}
BENCHMARK(BM_Limits)->ArgName("run")->Arg(0)->Arg(128)->Arg(256)->Arg(768)->Iterations(1);

// The same limits in processor time, for machines with other things to do.
void BM_Memcpy(benchmark::State& state) {
  std::vector<std::byte> out(kPackedBytes, std::byte{1});
  std::size_t at = 0;
  for (auto _ : state) {
    std::memcpy(out.data(), pool_memory().data() + at, kPackedBytes);
    benchmark::ClobberMemory();
    at = (at + kPackedBytes) % (kPoolBytes - kPackedBytes);
  }
  finish(state, kPackedBytes);
}
BENCHMARK(BM_Memcpy);

void BM_RandomRuns(benchmark::State& state) {
  const auto run = static_cast<std::size_t>(state.range(0));
  std::mt19937_64 random(1);
  std::vector<std::size_t> places(kPackedBytes / run);
  for (std::size_t& place : places) place = random() % (kPoolBytes / run) * run;
  std::sort(places.begin(), places.end());
  std::vector<std::byte> out(kPackedBytes, std::byte{1});
  for (auto _ : state) {
    std::byte* target = out.data();
    for (const std::size_t place : places) {
      std::memcpy(target, pool_memory().data() + place, run);
      target += run;
    }
    benchmark::ClobberMemory();
  }
  finish(state, places.size() * run);
}
BENCHMARK(BM_RandomRuns)->ArgName("run")->Arg(128)->Arg(256)->Arg(384)->Arg(768);

double limit_of(const Workload& work, std::int64_t slots_in_a_row) {
  const bool whole = slots_in_a_row >= work.layout.block_size;
  if (whole) return copy_limit();
  const std::size_t run =
      work.layout.tokens_contiguous()
          ? work.layout.fragment_bytes * static_cast<std::size_t>(slots_in_a_row)
          : work.layout.fragment_bytes;
  return gather_limit(run);
}

void gather_with(benchmark::State& state, BlockOrder order) {
  Workload work = workload(spec_of(state.range(0), state.range(1), order),
                           static_cast<std::uint64_t>(state.range(2)));
  for (auto _ : state) {
    gather(work.layout, work.memory, work.ranges, work.packed);
    benchmark::ClobberMemory();
  }
  finish(state, work.packed.size(), limit_of(work, state.range(2)));
}
void scatter_with(benchmark::State& state, BlockOrder order) {
  Workload work = workload(spec_of(state.range(0), state.range(1), order),
                           static_cast<std::uint64_t>(state.range(2)));
  for (auto _ : state) {
    scatter(work.layout, work.memory, work.ranges, work.packed);
    benchmark::ClobberMemory();
  }
  finish(state, work.packed.size(), limit_of(work, state.range(2)));
}
void BM_GatherHnd(benchmark::State& state) {
  gather_with(state, BlockOrder::hnd);
}
void BM_GatherNhd(benchmark::State& state) {
  gather_with(state, BlockOrder::nhd);
}
void BM_ScatterHnd(benchmark::State& state) {
  scatter_with(state, BlockOrder::hnd);
}
void BM_ScatterNhd(benchmark::State& state) {
  scatter_with(state, BlockOrder::nhd);
}

// (KV heads, head_dim, slots in a row): SmolLM2 (128-byte runs), Llama 3 (256), and one latent-like
// layout of 768-byte runs; whole blocks, three slots, single slots.
void layouts(benchmark::internal::Benchmark* bench) {
  for (const auto& [heads, dim] : {std::pair<int, int>{3, 64}, {8, 128}, {1, 384}}) {
    for (const int run : {64, 3, 1}) bench->Args({heads, dim, run});
  }
}
BENCHMARK(BM_GatherHnd)->Apply(layouts);
BENCHMARK(BM_GatherNhd)->Apply(layouts);
BENCHMARK(BM_ScatterHnd)->Apply(layouts);
BENCHMARK(BM_ScatterNhd)->Apply(layouts);

void BM_GatherCrc(benchmark::State& state) {
  Workload work =
      workload(spec_of(8, 128, BlockOrder::hnd), static_cast<std::uint64_t>(state.range(0)));
  for (auto _ : state) {
    benchmark::DoNotOptimize(gather_crc(work.layout, work.memory, work.ranges, work.packed, 0));
  }
  finish(state, work.packed.size());
}
BENCHMARK(BM_GatherCrc)->Arg(64)->Arg(1);

void BM_Crc32c(benchmark::State& state) {
  const auto size = static_cast<std::size_t>(state.range(0));
  const std::span<const std::byte> bytes(pool_memory().data(), size);
  for (auto _ : state) benchmark::DoNotOptimize(crc32c(bytes));
  finish(state, size);
}
BENCHMARK(BM_Crc32c)->Arg(64)->Arg(4096)->Arg(65536)->Arg(4 << 20);

void BM_Crc32cPortable(benchmark::State& state) {
  const std::span<const std::byte> bytes(pool_memory().data(), 65536);
  for (auto _ : state) benchmark::DoNotOptimize(crc32c_portable(bytes));
  finish(state, bytes.size());
}
BENCHMARK(BM_Crc32cPortable);

void BM_Crc32cCopy(benchmark::State& state) {
  const std::span<const std::byte> bytes(pool_memory().data(), kPackedBytes);
  std::vector<std::byte> out(kPackedBytes, std::byte{1});
  for (auto _ : state) benchmark::DoNotOptimize(crc32c_copy(out.data(), bytes));
  finish(state, bytes.size(), copy_limit());
}
BENCHMARK(BM_Crc32cCopy);

void require(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(what);
}

struct Pair {
  std::unique_ptr<Channel> a;
  std::unique_ptr<Channel> b;
};

Pair make_shm() {
  int fds[2];
  require(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "socketpair");
  UniqueFd memory = ShmChannel::create_memory(ShmChannel::kDefaultRingBytes);
  UniqueFd other(dup(memory.get()));
  return {std::make_unique<ShmChannel>(UniqueFd(fds[0]), std::move(memory), 0),
          std::make_unique<ShmChannel>(UniqueFd(fds[1]), std::move(other), 1)};
}

Pair make_tcp() {
  UniqueFd listening(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  require(bind(listening.get(), generic, size) == 0 && listen(listening.get(), 1) == 0 &&
              getsockname(listening.get(), generic, &size) == 0,
          "listen");
  UniqueFd a(socket(AF_INET, SOCK_STREAM, 0));
  require(connect(a.get(), generic, size) == 0, "connect");
  UniqueFd b(accept(listening.get(), nullptr, nullptr));
  for (const int fd : {a.get(), b.get()}) {
    const int bytes = 4 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
  }
  return {std::make_unique<TcpChannel>(std::move(a)), std::make_unique<TcpChannel>(std::move(b))};
}

Deadline soon() {
  return Deadline::after(std::chrono::seconds(60));
}

// One thread fills lent buffers from cold memory, the other copies messages out into its own.
void throughput(benchmark::State& state, Pair pair) {
  const auto size = static_cast<std::size_t>(state.range(0));
  std::thread reader([&b = *pair.b, size] {
    std::vector<std::byte> own(size);
    try {
      while (true) {
        const std::span<const std::byte> message = b.receive(soon());
        std::memcpy(own.data(), message.data(), message.size());
        b.release();
      }
    } catch (const Error&) {
    }
  });
  std::size_t at = 0;
  for (auto _ : state) {
    const std::span<std::byte> buffer = pair.a->acquire(size, soon());
    std::memcpy(buffer.data(), pool_memory().data() + at, size);
    pair.a->submit(size, soon());
    at = (at + size) % (kPoolBytes - size);
  }
  finish(state, size, copy_limit());
  pair.a->close();
  reader.join();
}
void BM_ShmThroughput(benchmark::State& state) {
  throughput(state, make_shm());
}
void BM_TcpThroughput(benchmark::State& state) {
  throughput(state, make_tcp());
}
BENCHMARK(BM_ShmThroughput)->Arg(4 << 20)->Arg(256 << 10)->Arg(4096)->UseRealTime();
BENCHMARK(BM_TcpThroughput)->Arg(4 << 20)->Arg(256 << 10)->Arg(4096)->UseRealTime();

// There and back of 64 bytes: what an acknowledgement costs.
void round_trip(benchmark::State& state, Pair pair) {
  std::thread echo([&b = *pair.b] {
    try {
      while (true) {
        const std::span<const std::byte> message = b.receive(soon());
        const std::vector<std::byte> copy(message.begin(), message.end());
        b.release();
        send(b, copy, soon());
      }
    } catch (const Error&) {
    }
  });
  const std::vector<std::byte> message(64, std::byte{1});
  for (auto _ : state) {
    send(*pair.a, message, soon());
    static_cast<void>(pair.a->receive(soon()));
    pair.a->release();
  }
  pair.a->close();
  echo.join();
}
void BM_ShmRoundTrip(benchmark::State& state) {
  round_trip(state, make_shm());
}
void BM_TcpRoundTrip(benchmark::State& state) {
  round_trip(state, make_tcp());
}
BENCHMARK(BM_ShmRoundTrip)->UseRealTime();
BENCHMARK(BM_TcpRoundTrip)->UseRealTime();

}  // namespace
}  // namespace pipelive
