#pragma once

// What the parts of kernels that are also compiled for the CPU (in tests, and where the host lays
// out work for them) are written in. No other header: NVRTC compiles these files too.

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PIPELIVE_HD __host__ __device__ __forceinline__
#define PIPELIVE_UNROLL _Pragma("unroll")
#else
#define PIPELIVE_HD inline
#define PIPELIVE_UNROLL
#endif

namespace pipelive::cuda {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(i64) == 8);

/// Memory at an address that the host handed over as a number.
template <typename T>
PIPELIVE_HD T* at_address(u64 address) {
  return reinterpret_cast<T*>(address);
}

PIPELIVE_HD u32 count_ones(u32 word) {
#if defined(__CUDA_ARCH__)
  return static_cast<u32>(__popc(static_cast<int>(word)));
#else
  return static_cast<u32>(__builtin_popcount(word));
#endif
}

/// The number of zeros below the lowest one; the word is not 0.
PIPELIVE_HD u32 count_trailing_zeros(u32 word) {
#if defined(__CUDA_ARCH__)
  return static_cast<u32>(__ffs(static_cast<int>(word)) - 1);
#else
  return static_cast<u32>(__builtin_ctz(word));
#endif
}

}  // namespace pipelive::cuda
