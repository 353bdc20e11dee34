// The kernels for float32 queries, over KV of every type.
#include "attention_body.cuh"

#define PIPELIVE_KERNEL(type, name, dim)                                            \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::attention::kThreads) \
      pipelive_attention_f32_##name##_d##dim##_r8(                                  \
          const __grid_constant__ pipelive::cuda::attention::Params p) {            \
    using namespace pipelive::cuda::attention;                                      \
    Block<ScalarMath<type, dim>>(p).run();                                          \
  }
#define PIPELIVE_KERNELS(dim)        \
  PIPELIVE_KERNEL(float, f32, dim)   \
  PIPELIVE_KERNEL(Float16, f16, dim) \
  PIPELIVE_KERNEL(BFloat16, bf16, dim)

#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 64
PIPELIVE_KERNELS(64)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 128
PIPELIVE_KERNELS(128)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 256
PIPELIVE_KERNELS(256)
#endif

#undef PIPELIVE_KERNELS
#undef PIPELIVE_KERNEL
