// Writes the keys and values of tokens to their slots and marks the slots, in one launch.
#include "pipelive/cuda/append_math.hpp"

namespace pipelive::cuda {
namespace {

struct DeviceMemory {
  static __device__ __forceinline__ u32 load(const u32* word) {
    u32 value;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(word));
    return value;
  }
  static __device__ __forceinline__ void set_bits(u32* word, u32 bits) { atomicOr(word, bits); }
  static __device__ __forceinline__ void add(u64* number, u64 more) { atomicAdd(number, more); }
};

template <typename Move>
__device__ __forceinline__ void append_all(const AppendArgs& args) {
  const u32 item = blockIdx.x * kAppendThreads + threadIdx.x;
  if (item < args.items) append_item<Move, DeviceMemory>(args, item);
}

}  // namespace
}  // namespace pipelive::cuda

#define PIPELIVE_APPEND(name, Move)                                            \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::kAppendThreads) \
      name(const pipelive::cuda::AppendArgs args) {                            \
    using namespace pipelive::cuda;                                            \
    append_all<Move>(args);                                                    \
  }
PIPELIVE_APPEND(pipelive_append_16, MoveRaw<Vector16>)
PIPELIVE_APPEND(pipelive_append_4, MoveRaw<u32>)
PIPELIVE_APPEND(pipelive_append_2, MoveRaw<u16>)
PIPELIVE_APPEND(pipelive_append_bfloat16_4, MoveNarrow4<NarrowToBfloat16>)
PIPELIVE_APPEND(pipelive_append_bfloat16_1, MoveNarrow1<NarrowToBfloat16>)
PIPELIVE_APPEND(pipelive_append_float16_4, MoveNarrow4<NarrowToFloat16>)
PIPELIVE_APPEND(pipelive_append_float16_1, MoveNarrow1<NarrowToFloat16>)
