// The emulator's 16-bit numbers: how they are rounded and widened.
#include <algorithm>
#include <bit>
#include <cmath>

#include "attention_emulator.hpp"

namespace pipelive::cuda::attention {
namespace emulator {

float half_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

unsigned short float_to_half(float value) {
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7FFF;
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int shift = std::max(exponent, -13) - 11;
  // nearbyint rounds to even; the result may carry into the next exponent, as it should.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, -shift)));
  return static_cast<unsigned short>(sign | (units + ((shift + 24) << 10)));
}

unsigned short float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

unsigned pack(Float16, float low, float high) {
  return emulator::float_to_half(low) | static_cast<unsigned>(emulator::float_to_half(high)) << 16;
}
unsigned pack(BFloat16, float low, float high) {
  return emulator::float_to_bfloat16(low) | static_cast<unsigned>(emulator::float_to_bfloat16(high))
                                                << 16;
}
float widen(Float16 value) {
  return emulator::half_to_float(value.bits);
}
float widen(BFloat16 value) {
  return float_of_bits(static_cast<unsigned>(value.bits) << 16);
}
float float_of_bits(unsigned bits) {
  return std::bit_cast<float>(bits);
}
unsigned bits_of_float(float value) {
  return std::bit_cast<unsigned>(value);
}

}  // namespace pipelive::cuda::attention
