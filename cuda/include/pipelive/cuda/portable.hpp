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

/// What `shift_of` says of a number that is no power of two.
inline constexpr u32 kNoShift = 32;
/// The power of two that a number is, or kNoShift.
PIPELIVE_HD u32 shift_of(u32 number) {
  return number != 0 && (number & (number - 1)) == 0 ? count_trailing_zeros(number) : kNoShift;
}
/// value / by, where `shift` is shift_of(by): devices have no instruction that divides integers,
/// and the twenty or so that do it instead stand before the address of every load.
PIPELIVE_HD u32 quotient(u32 value, u32 by, u32 shift) {
  return shift < kNoShift ? value >> shift : value / by;
}

}  // namespace pipelive::cuda
