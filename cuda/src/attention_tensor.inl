// The kernels for 16-bit queries of one type; included with PIPELIVE_TYPE and PIPELIVE_TYPE_NAME
// set. Where PIPELIVE_HEAD_DIM is set only those for that head dim are compiled, as NVRTC does.
#define PIPELIVE_JOIN_(a, b, c) pipelive_attention_##a##_d##b##_r##c
#define PIPELIVE_JOIN(a, b, c) PIPELIVE_JOIN_(a, b, c)
// The last parameter is the number of blocks that a multiprocessor should hold, for registers.
#define PIPELIVE_KERNEL(dim, column_tiles, rows, blocks)                                    \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::attention::kThreads, blocks) \
      PIPELIVE_JOIN(PIPELIVE_TYPE_NAME, dim,                                                \
                    rows)(const __grid_constant__ pipelive::cuda::attention::Params p) {    \
    using namespace pipelive::cuda::attention;                                              \
    Block<TensorMath<PIPELIVE_TYPE, dim, column_tiles>>(p).run();                           \
  }

#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 64
PIPELIVE_KERNEL(64, 1, 8, 3)
PIPELIVE_KERNEL(64, 4, 32, 2)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 80
PIPELIVE_KERNEL(80, 1, 8, 3)
PIPELIVE_KERNEL(80, 4, 32, 2)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 96
PIPELIVE_KERNEL(96, 1, 8, 2)
PIPELIVE_KERNEL(96, 4, 32, 2)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 128
PIPELIVE_KERNEL(128, 1, 8, 2)
PIPELIVE_KERNEL(128, 4, 32, 2)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 192
PIPELIVE_KERNEL(192, 1, 8, 2)
PIPELIVE_KERNEL(192, 2, 16, 2)
#endif
#if !defined(PIPELIVE_HEAD_DIM) || PIPELIVE_HEAD_DIM == 256
PIPELIVE_KERNEL(256, 1, 8, 1)
PIPELIVE_KERNEL(256, 2, 16, 1)
#endif

#undef PIPELIVE_KERNEL
#undef PIPELIVE_JOIN
#undef PIPELIVE_JOIN_
#undef PIPELIVE_TYPE
#undef PIPELIVE_TYPE_NAME
