// The vector type of the AVX-512 kernels; needs simd_256.inl.

using V = __m512;
constexpr int kWidth = 16;
constexpr int kQkRows = 4;
constexpr int kPvRows = 4;

inline V zero() {
  return _mm512_setzero_ps();
}
inline V set1(float x) {
  return _mm512_set1_ps(x);
}
inline V loadf(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void storef(float* p, V v) {
  _mm512_storeu_ps(p, v);
}
inline V add(V a, V b) {
  return _mm512_add_ps(a, b);
}
inline V sub(V a, V b) {
  return _mm512_sub_ps(a, b);
}
inline V mul(V a, V b) {
  return _mm512_mul_ps(a, b);
}
inline V divide(V a, V b) {
  return _mm512_div_ps(a, b);
}
inline V fma(V a, V b, V c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline V vmin(V a, V b) {
  return _mm512_min_ps(a, b);
}
inline V vmax(V a, V b) {
  return _mm512_max_ps(a, b);
}
inline V vabs(V a) {
  return _mm512_abs_ps(a);
}
inline V select_less(V a, V b, V less, V otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, less);
}
inline V exponent_bits(V biased) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(biased), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

/// The sums of a, b, c and d of 128-bit lanes 0 + 2 and 1 + 3, one vector's per lane.
inline V lanes4(V a, V b, V c, V d) {
  const V ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const V cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
/// In each 128-bit lane the sums of that lane of a, b, c and d. The order of additions within a
/// lane is (0 + 2) + (1 + 3) here and in horizontal_sum.
inline V within4(V a, V b, V c, V d) {
  const V ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const V cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
inline float horizontal_sum(V v) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float horizontal_max(V v) {
  const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline void reduce4(const V* v, float* out) {
  const V lanes = lanes4(v[0], v[1], v[2], v[3]);
  V x = add(lanes, _mm512_permute_ps(lanes, 0x4e));
  x = add(x, _mm512_permute_ps(x, 0xb1));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
}
inline void reduce4x4(const V (*v)[4], float* out, int stride) {
  // Rows to lanes, keys within a lane.
  const V x = within4(
      lanes4(v[0][0], v[1][0], v[2][0], v[3][0]), lanes4(v[0][1], v[1][1], v[2][1], v[3][1]),
      lanes4(v[0][2], v[1][2], v[2][2], v[3][2]), lanes4(v[0][3], v[1][3], v[2][3], v[3][3]));
  _mm_storeu_ps(out, _mm512_castps512_ps128(x));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(x, 3));
}

inline V load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline V load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline V load(const Brain* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
template <class E>
inline V load_half(const E* p) {
  return _mm512_insertf32x8(_mm512_setzero_ps(), load8(p), 0);
}
