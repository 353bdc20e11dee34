// Gathers slot ranges of several layers into one buffer of packed bytes, scatters them from it, and
// sums such bytes.
#include "pipelive/cuda/crc_math.hpp"
#include "pipelive/cuda/slot_math.hpp"

#define PIPELIVE_COPY(bytes, Vector)                                         \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::kCopyThreads) \
      pipelive_gather_##bytes(const pipelive::cuda::SlotCopyArgs args) {     \
    pipelive::cuda::copy_tile<Vector, true>(args, blockIdx.x, threadIdx.x);  \
  }                                                                          \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::kCopyThreads) \
      pipelive_scatter_##bytes(const pipelive::cuda::SlotCopyArgs args) {    \
    pipelive::cuda::copy_tile<Vector, false>(args, blockIdx.x, threadIdx.x); \
  }
PIPELIVE_COPY(16, pipelive::cuda::Vector16)
PIPELIVE_COPY(8, pipelive::cuda::u64)
PIPELIVE_COPY(4, pipelive::cuda::u32)
PIPELIVE_COPY(2, pipelive::cuda::u16)
PIPELIVE_COPY(1, unsigned char)

extern "C" __global__ void __launch_bounds__(pipelive::cuda::kCrcThreads)
    pipelive_crc_tiles(const pipelive::cuda::CrcArgs args) {
  using namespace pipelive::cuda;
  __shared__ u32 fold[4][256];
  __shared__ u32 sums[kCrcThreads / 32];
  const CrcTables* tables = at_address<const CrcTables>(args.tables);
  for (u32 i = threadIdx.x; i < 4 * 256; i += kCrcThreads) {
    fold[i / 256][i % 256] = tables->fold[i / 256][i % 256];
  }
  __syncthreads();
  for (u32 tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    u32 sum = crc_of_thread(args, fold, tile, threadIdx.x);
    for (int lanes = 16; lanes != 0; lanes /= 2) {
      sum ^= __shfl_xor_sync(0xFFFFFFFFU, sum, lanes);
    }
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 all = 0;
      for (u32 i = 0; i < kCrcThreads / 32; ++i) all ^= sums[i];
      at_address<u32>(args.sums)[tile] = all;
    }
    __syncthreads();  // before `sums` is written again
  }
}
