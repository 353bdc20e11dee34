// Whole rounds from one pool to another: packing, checksum, channel, check, scatter.
#include <benchmark/benchmark.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "pipelive/base/error.hpp"
#include "pipelive/migration/patch_receiver.hpp"
#include "pipelive/migration/patch_sender.hpp"
#include "pipelive/transport/shm_channel.hpp"
#include "pipelive/transport/tcp_channel.hpp"

namespace pipelive {
namespace {

constexpr std::uint32_t kLayers = 4;
constexpr std::uint64_t kBlocks = 512;

struct End {
  std::vector<std::vector<std::byte>> memory;

  PatchLayers layers() {
    const KVSpec spec{8, 128, DType::bfloat16, 16, BlockOrder::hnd};
    const BlockLayout layout = spec.layout();
    std::vector<PatchLayer> result;
    for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
      memory.emplace_back(kBlocks * layout.block_bytes, std::byte{1});
      result.push_back(
          {layer, layout, {memory.back().data(), layout.block_bytes, kBlocks}, nullptr});
    }
    return {spec, std::move(result)};
  }
};

Deadline soon() {
  return Deadline::after(std::chrono::seconds(60));
}

// range(0): 1 with checksums; range(1): slots in a row (0: everything); range(2): 1 for shm.
void BM_Round(benchmark::State& state) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) return state.SkipWithError("socketpair");
  std::shared_ptr<Channel> a;
  std::shared_ptr<Channel> b;
  if (state.range(2) != 0) {
    UniqueFd shared = ShmChannel::create_memory(ShmChannel::kDefaultRingBytes);
    UniqueFd other(dup(shared.get()));
    a = std::make_shared<ShmChannel>(UniqueFd(fds[0]), std::move(shared), 0);
    b = std::make_shared<ShmChannel>(UniqueFd(fds[1]), std::move(other), 1);
  } else {
    a = std::make_shared<TcpChannel>(UniqueFd(fds[0]));
    b = std::make_shared<TcpChannel>(UniqueFd(fds[1]));
  }
  End source;
  End target;
  PatchReceiver receiver(b, target.layers(), {});
  std::thread applying([&] {
    try {
      receiver.run(Deadline::after(std::chrono::hours(1)));
    } catch (const Error&) {
    }
  });
  PatchSender::Options options;
  options.checksum = state.range(0) != 0;
  PatchSender sender(a, source.layers(), options);
  std::vector<SlotRange> ranges;
  const auto run = static_cast<std::uint64_t>(state.range(1));
  if (run == 0) {
    ranges.push_back({0, kBlocks * 16});
  } else {
    // As many sequences as decode at once, each with its newest slots, at random blocks.
    std::mt19937_64 random(1);
    for (int i = 0; i < 256; ++i) ranges.push_back({random() % kBlocks * 16 + random() % 8, run});
    std::sort(ranges.begin(), ranges.end(),
              [](const SlotRange& x, const SlotRange& y) { return x.begin < y.begin; });
  }
  std::uint64_t round = 0;
  std::uint64_t bytes = 0;
  for (auto _ : state) {
    const auto seq = static_cast<std::int64_t>(round);
    bytes += sender.send_round(round++, seq, ranges, {}, soon()).bytes;
    sender.wait_applied(seq, soon());
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes));
  sender.cancel();
  receiver.cancel();
  applying.join();
}
BENCHMARK(BM_Round)
    ->ArgNames({"crc", "run", "shm"})
    ->ArgsProduct({{0, 1}, {0, 1, 4}, {0, 1}})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace pipelive
