// The kernels of attention_bf16.cu as functions of the CPU, found by name (see
// attention_cases.cpp).
#include "attention_emulator.hpp"

#define __global__ __attribute__((visibility("default"), used))
#define __launch_bounds__(...)
#define __grid_constant__

#include "attention_bf16.cu"
