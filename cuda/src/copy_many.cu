// Makes many short copies within the memory of a device.
#include "pipelive/cuda/copy_math.hpp"

extern "C" __global__ void __launch_bounds__(pipelive::cuda::kCopyManyThreads)
    pipelive_copy_many(const pipelive::cuda::CopyManyArgs args) {
  pipelive::cuda::copy_entry(args, blockIdx.x, threadIdx.x);
}
