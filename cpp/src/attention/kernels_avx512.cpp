#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

namespace pipelive::attention_detail {
namespace {

#include "simd_256.inl"

#include "simd_512.inl"

#include "kernel_body.inl"

constexpr Kernels kKernels{{attend<float>, attend<Half>, attend<Brain>},
                           fold,
                           {widen<float>, widen<Half>, widen<Brain>},
                           {narrow<float>, narrow<Half>, narrow<Brain>},
                           false};

}  // namespace

const Kernels* avx512_kernels() noexcept {
  return &kKernels;
}

}  // namespace pipelive::attention_detail
#else
namespace pipelive::attention_detail {
const Kernels* avx512_kernels() noexcept {
  return nullptr;
}
}  // namespace pipelive::attention_detail
#endif
