#include "kernels.hpp"

#if defined(__x86_64__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace pipelive::attention_detail {
namespace {

#include "simd_256.inl"

#include "simd_512.inl"

#include "kernel_body.inl"
// Below: products of bfloat16 pairs, for a bfloat16 query over bfloat16 KV.
inline V dot_pairs(V sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline __m256i to_bf16(V v) {
  return (__m256i)_mm512_cvtneps_pbh(v);
}
#include "kernel_bf16.inl"

constexpr Kernels kKernels{{attend<float>, attend<Half>, attend_brain},
                           fold,
                           {widen<float>, widen<Half>, widen<Brain>},
                           {narrow<float>, narrow<Half>, narrow<Brain>},
                           true};

}  // namespace

const Kernels* avx512_bf16_kernels() noexcept {
  return &kKernels;
}

}  // namespace pipelive::attention_detail
#else
namespace pipelive::attention_detail {
const Kernels* avx512_bf16_kernels() noexcept {
  return nullptr;
}
}  // namespace pipelive::attention_detail
#endif
