#include "device_crc.hpp"

#include <algorithm>
#include <utility>

namespace pipelive::cuda {
namespace {

constexpr std::size_t kSumBytes = std::size_t{64} << 10;
constexpr u32 kLeastRows = 4;
constexpr u32 kMostRows = 64;
constexpr u32 kWantedTiles = 1024;  // eight blocks for each of a large device's multiprocessors
constexpr u32 kMostBlocks = 1024;
// A piece's sums fit the buffer.
constexpr std::uint64_t kMostBytes =
    kSumBytes / sizeof(u32) * kLeastRows * kCrcRowBytes;  // 256 MiB

}  // namespace

DeviceCrc::DeviceCrc(std::shared_ptr<const SlotKernels> kernels)
    : kernels_(std::move(kernels)),
      sums_(kernels_->context()->driver(), kSumBytes),
      device_sums_(kernels_->context()->driver(), kSumBytes) {}

CrcArgs DeviceCrc::start(DevicePointer bytes, std::size_t size, StreamHandle stream) {
  const std::uint64_t piece = std::min<std::uint64_t>(size, kMostBytes);
  CrcArgs args{};
  args.bytes = bytes;
  args.size = piece;
  args.tables = kernels_->crc_tables();
  args.sums = device_sums_.pointer();
  args.rows = static_cast<u32>(
      std::clamp<std::uint64_t>(piece / kCrcRowBytes / kWantedTiles, kLeastRows, kMostRows));
  const std::uint64_t tile = std::uint64_t{args.rows} * kCrcRowBytes;
  args.tiles = static_cast<u32>((piece + tile - 1) / tile);
  args.by_words = (bytes | piece) % 16 == 0 ? 1 : 0;
  kernels_->launch(kernels_->crc_tiles, "pipelive_crc_tiles", std::min(args.tiles, kMostBlocks),
                   kCrcThreads, stream, args);
  const Driver& driver = kernels_->context()->driver();
  driver.check(driver.api().memcpy_to_host_async(sums_.data(), device_sums_.pointer(),
                                                 args.tiles * sizeof(u32), stream),
               "cuMemcpyDtoHAsync");
  return args;
}

std::uint32_t DeviceCrc::join(const CrcArgs& piece, std::uint32_t seed) const {
  return join_crc(piece, reinterpret_cast<const u32*>(sums_.data()), seed);
}

}  // namespace pipelive::cuda
