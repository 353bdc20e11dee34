// Writes the keys and values of tokens to their slots and marks the slots, in one launch.
#include "pipelive/cuda/append_math.hpp"

namespace pipelive::cuda {
namespace {

struct DeviceMemory {
  // Volatile, so that no compiler moves them behind the look at the slot.
  static __device__ __forceinline__ Vector16 fetch(const Vector16* from) {
    Vector16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
  }
  static __device__ __forceinline__ Floats4 fetch(const Floats4* from) {
    Floats4 v;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from));
    return v;
  }
  static __device__ __forceinline__ i64 fetch(const i64* from) {
    i64 v;
    asm volatile("ld.global.s64 %0, [%1];" : "=l"(v) : "l"(from));
    return v;
  }
  static __device__ __forceinline__ u32 fetch(const u32* from) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
  }
  static __device__ __forceinline__ u16 fetch(const u16* from) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
  }
  static __device__ __forceinline__ float fetch(const float* from) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
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
