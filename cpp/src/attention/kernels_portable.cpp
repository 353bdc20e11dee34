#include "kernels.hpp"

// Plain arithmetic on vectors of four floats, which every compiler we support can map.
namespace pipelive::attention_detail {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef std::int32_t I __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kQkRows = 1;
constexpr int kPvRows = 2;

struct Half {
  std::uint16_t bits;
};
struct Brain {
  std::uint16_t bits;
};

inline V zero() {
  return V{0, 0, 0, 0};
}
inline V set1(float x) {
  return V{x, x, x, x};
}
inline V loadf(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void storef(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline V add(V a, V b) {
  return a + b;
}
inline V sub(V a, V b) {
  return a - b;
}
inline V mul(V a, V b) {
  return a * b;
}
inline V divide(V a, V b) {
  return a / b;
}
inline V fma(V a, V b, V c) {
  return a * b + c;
}
inline V select(I mask, V a, V b) {
  return (V)((mask & (I)a) | (~mask & (I)b));
}
inline V vmin(V a, V b) {
  return select(a < b, a, b);
}
inline V vmax(V a, V b) {
  return select(a > b, a, b);
}
inline V vabs(V a) {
  return (V)((I)a & 0x7fffffff);
}
inline V select_less(V a, V b, V less, V otherwise) {
  return select(a < b, less, otherwise);
}
inline V exponent_bits(V biased) {
  typedef std::uint32_t U __attribute__((vector_size(16)));
  return (V)(((U)biased + 127u) << 23);
}
inline float horizontal_sum(V v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
inline float horizontal_max(V v) {
  const float a = v[0] > v[2] ? v[0] : v[2];
  const float b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
inline void reduce4(const V* v, float* out) {
  for (int t = 0; t < 4; ++t) out[t] = horizontal_sum(v[t]);
}
[[maybe_unused]] inline void reduce4x4(const V (*)[4], float*, int) {}

inline float from_bits(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline std::uint32_t to_bits(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(Brain x) {
  return from_bits(std::uint32_t{x.bits} << 16);
}
inline float to_float(Half x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifted into place the exponent is short by 112; the product repairs it, subnormals included.
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  return from_bits(sign | to_bits(scaled));
}

inline std::uint16_t round_to(float x, Brain) {
  const std::uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((bits >> 16) | 0x40u);
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline std::uint16_t round_to(float x, Half) {
  const std::uint32_t bits = to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return std::uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return std::uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 moves the subnormal's units to the last place, and rounds to nearest even.
    return std::uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return std::uint16_t(sign | ((magnitude - 0x38000000u) >> 13));
}

inline V load(const float* p) {
  return loadf(p);
}
template <class E>
inline V load(const E* p) {
  return V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class E>
inline V load_half(const E*) {
  return zero();
}

#include "kernel_body.inl"

void narrow_float(const float* from, float factor, void* to, int count) {
  for (int i = 0; i < count; i += kWidth) {
    storef(static_cast<float*>(to) + i, mul(loadf(from + i), set1(factor)));
  }
}
template <class E>
void narrow(const float* from, float factor, void* to, int count) {
  std::uint16_t* out = static_cast<std::uint16_t*>(to);
  for (int i = 0; i < count; ++i) out[i] = round_to(from[i] * factor, E{});
}

constexpr Kernels kKernels{{attend<float>, attend<Half>, attend<Brain>},
                           fold,
                           {widen<float>, widen<Half>, widen<Brain>},
                           {narrow_float, narrow<Half>, narrow<Brain>},
                           false};

}  // namespace

const Kernels* portable_kernels() noexcept {
  return &kKernels;
}

}  // namespace pipelive::attention_detail
