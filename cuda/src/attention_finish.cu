// What follows the attention kernels, and a check of block tables for debugging.
#include "attention_body.cuh"

#define PIPELIVE_FINISH(type, name)                                                 \
  extern "C" __global__ void __launch_bounds__(pipelive::cuda::attention::kThreads) \
      pipelive_attention_finish_##name(                                             \
          const __grid_constant__ pipelive::cuda::attention::Params p) {            \
    pipelive::cuda::attention::finish<pipelive::cuda::attention::type>(p);          \
  }
namespace pipelive::cuda::attention {
using Float32 = float;
}
PIPELIVE_FINISH(Float32, f32)
PIPELIVE_FINISH(Float16, f16)
PIPELIVE_FINISH(BFloat16, bf16)

extern "C" __global__ void __launch_bounds__(pipelive::cuda::attention::kThreads)
    pipelive_attention_check(const __grid_constant__ pipelive::cuda::attention::CheckParams check) {
  pipelive::cuda::attention::check_tables(check);
}

#undef PIPELIVE_FINISH
