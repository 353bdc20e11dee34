// The kernels for float32 queries, over KV of every type.
#include "attention_body.cuh"

// The last parameter is the number of blocks that a multiprocessor should hold, for registers: as
// many as its shared memory holds.
#define PIPELIVE_KERNEL(type, name, dim, blocks)                                            \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::attention::kThreads, blocks) \
      pipelive_attention_f32_##name##_d##dim##_r8(                                          \
          const __grid_constant__ pipelive::cuda::attention::Params p) {                    \
    using namespace pipelive::cuda::attention;                                              \
    Block<ScalarMath<type, dim>>(p).run();                                                  \
  }
#define PIPELIVE_KERNELS(dim, blocks32, blocks) \
  PIPELIVE_KERNEL(float, f32, dim, blocks32)    \
  PIPELIVE_KERNEL(Float16, f16, dim, blocks)    \
  PIPELIVE_KERNEL(BFloat16, bf16, dim, blocks)

#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 64
PIPELIVE_KERNELS(64, 3, 4)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 128
PIPELIVE_KERNELS(128, 3, 3)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 256
PIPELIVE_KERNELS(256, 2, 2)
#endif

#undef PIPELIVE_KERNELS
#undef PIPELIVE_KERNEL
