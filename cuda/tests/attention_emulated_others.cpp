// The other attention kernels as functions of the CPU.
#include "attention_emulator.hpp"

#define __global__ __attribute__((visibility("default"), used))
#define __launch_bounds__(...)
#define __grid_constant__

#include "attention_f16.cu"
#include "attention_f32.cu"
#include "attention_finish.cu"
