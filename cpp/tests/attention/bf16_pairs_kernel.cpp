#include "attention/bf16_pairs_kernel.hpp"

#if defined(__x86_64__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace pipelive::testing {
namespace {

#include "../../src/attention/simd_256.inl"

#include "../../src/attention/simd_512.inl"

#include "../../src/attention/kernel_body.inl"

inline V dot_pairs(V sum, __m512i a, __m512i b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  const auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
  return fma(even(a), even(b), fma(odd(a), odd(b), sum));
}
inline __m256i to_bf16(V v) {
  alignas(64) float lanes[16];
  alignas(32) Brain rounded[16];
  storef(lanes, v);
  narrow<Brain>(lanes, 1.0f, rounded, 16);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded));
}

#include "../../src/attention/kernel_bf16.inl"

constexpr Kernels kKernels{{attend<float>, attend<Half>, attend_brain},
                           fold,
                           {widen<float>, widen<Half>, widen<Brain>},
                           {narrow<float>, narrow<Half>, narrow<Brain>},
                           true};

}  // namespace

const attention_detail::Kernels* emulated_bf16_kernels() noexcept {
  return &kKernels;
}

}  // namespace pipelive::testing
#else
namespace pipelive::testing {
const attention_detail::Kernels* emulated_bf16_kernels() noexcept {
  return nullptr;
}
}  // namespace pipelive::testing
#endif
