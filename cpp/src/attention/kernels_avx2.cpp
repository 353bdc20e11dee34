#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

namespace pipelive::attention_detail {
namespace {

#include "simd_256.inl"

using V = __m256;
constexpr int kWidth = 8;
constexpr int kQkRows = 2;
constexpr int kPvRows = 2;

inline V zero() {
  return _mm256_setzero_ps();
}
inline V set1(float x) {
  return _mm256_set1_ps(x);
}
inline V loadf(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void storef(float* p, V v) {
  _mm256_storeu_ps(p, v);
}
inline V add(V a, V b) {
  return _mm256_add_ps(a, b);
}
inline V sub(V a, V b) {
  return _mm256_sub_ps(a, b);
}
inline V mul(V a, V b) {
  return _mm256_mul_ps(a, b);
}
inline V divide(V a, V b) {
  return _mm256_div_ps(a, b);
}
inline V fma(V a, V b, V c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline V vmin(V a, V b) {
  return _mm256_min_ps(a, b);
}
inline V vmax(V a, V b) {
  return _mm256_max_ps(a, b);
}
inline V vabs(V a) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
inline V select_less(V a, V b, V less, V otherwise) {
  return _mm256_blendv_ps(otherwise, less, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline V exponent_bits(V biased) {
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(biased), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
inline float horizontal_sum(V v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float horizontal_max(V v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline void reduce4(const V* v, float* out) {
  const __m256 ab = _mm256_hadd_ps(v[0], v[1]);
  const __m256 cd = _mm256_hadd_ps(v[2], v[3]);
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
[[maybe_unused]] inline void reduce4x4(const V (*)[4], float*, int) {}

template <class E>
inline V load(const E* p) {
  return load8(p);
}
template <class E>
inline V load_half(const E*) {
  return zero();
}

#include "kernel_body.inl"

constexpr Kernels kKernels{{attend<float>, attend<Half>, attend<Brain>},
                           fold,
                           {widen<float>, widen<Half>, widen<Brain>},
                           {narrow<float>, narrow<Half>, narrow<Brain>},
                           false};

}  // namespace

const Kernels* avx2_kernels() noexcept {
  return &kKernels;
}

}  // namespace pipelive::attention_detail
#else
namespace pipelive::attention_detail {
const Kernels* avx2_kernels() noexcept {
  return nullptr;
}
}  // namespace pipelive::attention_detail
#endif
